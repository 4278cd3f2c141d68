"""Answers to the requests of lm-evaluation-harness against its own tokenisation, without padding."""

import random

import pytest

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.harness import HarnessModel
from moeut_compose.evaluate.passages import continuation_passage, document_passages
from moeut_compose.generate import generate
from moeut_compose.progress import SilentReporter
from tests.evaluate.harness.conftest import CONTEXT, FAMILIES, MakeRun, Unpadded, requests_of

N_ITEMS = 200


def pairs(words: list[str]) -> list[tuple[str, str]]:
    """Contexts and continuations of many lengths: none, too long, with spaces at the border, or a word across it."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        start = draw.randrange(len(words) - high)
        return " ".join(words[start : start + draw.randint(low, high)])

    contexts = ["", *(f"{text(1, 60)}{' ' * draw.choice((0, 0, 0, 2))}" for _ in range(N_ITEMS - 1))]
    cut = [
        (f"{context} {word[:2]}", f"{word[2:]} {text(1, 4)}")
        for context, word in zip(contexts[1::5], words, strict=False)
    ]
    return [*((context, f" {text(1, 9)}") for context in contexts[: N_ITEMS - len(cut)]), *cut]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_of_every_family(make_run: MakeRun, words: list[str], family: str) -> None:
    run = make_run(family)
    requests = requests_of("loglikelihood", pairs(words))
    ours = HarnessModel(run, reporter=SilentReporter()).loglikelihood(requests)
    theirs = Unpadded(run).loglikelihood(requests, disable_tqdm=True)
    assert len(ours) == N_ITEMS
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_likelihoods_do_not_depend_on_the_batch(make_run: MakeRun, words: list[str]) -> None:
    run = make_run("moeut_tiny")
    requests = requests_of("loglikelihood", pairs(words)[:40])
    one = HarnessModel(run, batch_size=1, reporter=SilentReporter()).loglikelihood(requests)
    many = HarnessModel(run, batch_size="auto", reporter=SilentReporter()).loglikelihood(requests[::-1])[::-1]
    assert [value for value, _ in one] == pytest.approx([value for value, _ in many], abs=1e-4)


def test_a_greedy_continuation_is_greedy(make_run: MakeRun, words: list[str]) -> None:
    """What the model would write is told from what it would not, also where one token differs."""
    run = make_run("dense_tiny")
    context = " ".join(words[:12])
    written = generate(run.model, run.tokenizer, context, max_new_tokens=5, temperature=0, stop=None)
    continuation = written[len(context) :]
    model = HarnessModel(run, reporter=SilentReporter())
    requests = requests_of(
        "loglikelihood", [(context, continuation), (context, f"{continuation} {words[0]}")]
    )
    reference = Unpadded(run).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in model.loglikelihood(requests)] == [greedy for _, greedy in reference]


@pytest.mark.parametrize("family", ["dense_tiny", "sut_tiny"])
@pytest.mark.parametrize("n_words", [0, 1, 15, 30, 200])
def test_whole_texts(make_run: MakeRun, words: list[str], family: str, n_words: int) -> None:
    run = make_run(family)
    requests = requests_of("loglikelihood_rolling", [(" ".join(words[:n_words]),)])
    ours = HarnessModel(run, reporter=SilentReporter()).loglikelihood_rolling(requests)
    assert ours == pytest.approx(Unpadded(run).loglikelihood_rolling(requests), abs=1e-4 * max(1, n_words))


@pytest.mark.parametrize("n_tokens", [0, 1, 4, 5, 6, 9, 10, 11, 23])
def test_windows_score_every_token_once(n_tokens: int) -> None:
    """Five predictions a window; the harness cuts the same ones."""
    from lm_eval.utils import get_rolling_token_windows

    codec = Numbers()
    passages = document_passages(
        codec, " ".join(str(number) for number in range(1, n_tokens + 1)), context_length=5
    )
    assert [target for passage in passages for target in passage.targets] == list(range(1, n_tokens + 1))
    windows = get_rolling_token_windows(list(range(1, n_tokens + 1)), codec.start_id, 5, context_len=1)
    expected = [((*seen, predicted[-1]), len(predicted)) for seen, predicted in windows]
    assert [(passage.ids, passage.n_scored) for passage in passages] == expected


class Numbers:
    """A token is its own number."""

    start_id = 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_a_continuation_keeps_its_end() -> None:
    passage = continuation_passage(Numbers(), "1 2 3 4 ", "5 6", context_length=3)
    assert (passage.ids, passage.targets) == ((3, 4, 5, 6), (5, 6))
    longer = continuation_passage(Numbers(), "1", "2 3 4 5 6", context_length=3)
    assert (longer.ids, longer.targets) == ((3, 4, 5, 6), (4, 5, 6))


def test_continuations_end_before_the_first_stop_text(make_run: MakeRun, words: list[str]) -> None:
    run = make_run("moeut_tiny")
    prompt = " ".join(words[:8])
    whole = generate(run.model, run.tokenizer, prompt, max_new_tokens=20, temperature=0, stop=None)[
        len(prompt) :
    ]
    later, sooner = whole[-6:-3], whole[7:9]
    settings = [
        {"max_gen_toks": 20, "until": []},
        {"max_gen_toks": 20, "until": [later, sooner]},
        {"max_new_tokens": 20, "until": later},
        {"max_tokens": 3, "until": [sooner]},
    ]
    requests = requests_of("generate_until", [(prompt, setting) for setting in settings])
    written = HarnessModel(run, reporter=SilentReporter()).generate_until(requests)
    assert written[:3] == [whole, whole[: whole.find(sooner)], whole[: whole.find(later)]]
    assert whole.startswith(written[3])
    assert len(run.tokenizer.encode(written[3])) <= 4


def test_long_prompts_lose_their_beginning(make_run: MakeRun, words: list[str]) -> None:
    run = make_run("dense_tiny")
    ids = run.tokenizer.encode(" ".join(words[:100]))
    assert len(ids) > CONTEXT
    model = HarnessModel(run, reporter=SilentReporter())
    kept = run.tokenizer.decode(ids[-(CONTEXT - 8) :])
    prompts = [(" ".join(words[:100]), {"max_gen_toks": 8}), (kept, {"max_gen_toks": 8})]
    long, short = model.generate_until(requests_of("generate_until", prompts))
    assert long == short != ""


def test_more_tokens_than_a_window_are_refused(make_run: MakeRun) -> None:
    model = HarnessModel(make_run("dense_tiny"), reporter=SilentReporter())
    with pytest.raises(DataError, match=f"up to {CONTEXT} new tokens, and the run has windows of {CONTEXT}"):
        model.generate_until(requests_of("generate_until", [("a", {"max_gen_toks": CONTEXT})]))


def test_sampling_is_drawn_with_a_seed(make_run: MakeRun, words: list[str]) -> None:
    model = HarnessModel(make_run("dense_tiny"), reporter=SilentReporter())
    settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    prompt = " ".join(words[:8])
    drawn = [(prompt, settings), (prompt, settings), (prompt, {**settings, "do_sample": False})]
    first, second, greedy = model.generate_until(requests_of("generate_until", drawn))
    assert len({first, second, greedy}) == 3, "repeats of a prompt are draws of their own"
    assert model.generate_until(requests_of("generate_until", drawn)) == [first, second, greedy]
