"""Progress: plain lines where there is no terminal, a live display where there is one."""

import io

import pytest

from moeut_compose.progress import PlainReporter, RichReporter, format_amount, format_duration, make_reporter


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (86400 * 15 + 3600 * 3, "15 days 3 h"),
        (86400 * 40, "40 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_amounts() -> None:
    assert format_amount(499.9999, 500) == "500/500"
    assert format_amount(12345, None) == "12,345"


def test_plain_lines() -> None:
    stream = io.StringIO()
    reporter = make_reporter(stream)
    assert isinstance(reporter, PlainReporter)
    reporter.warn("careful")
    with reporter.task("training", total=4, done=2) as task:
        task.advance(2, detail="loss 3.1")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "warning: careful"
    assert lines[1].startswith("training: 4/4  loss 3.1")


def test_plain_lines_tell_the_time_left() -> None:
    stream = io.StringIO()
    with PlainReporter(stream, every=0.0).task("training", total=10) as task:
        task.advance(5)
    assert "training: 5/10" in stream.getvalue()
    assert "left" in stream.getvalue()


def test_a_failed_task_does_not_claim_to_be_done() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), PlainReporter(stream).task("training", total=10):
        raise KeyError
    assert stream.getvalue() == ""


def test_the_live_display_nests_tasks() -> None:
    stream = io.StringIO()
    reporter = RichReporter(stream)
    with reporter.task("training", total=4) as outer:
        outer.advance(1.5, detail="loss 3.1")
        with reporter.task("evaluating", total=2) as inner:
            inner.advance(2)
        reporter.note("perplexity [12]")
    with reporter.task("again", total=None) as task:
        task.advance()
    assert "perplexity [12]" in stream.getvalue()
    assert "again" in stream.getvalue()
