"""Names and paths: what is looked for where, and what is said when nothing is there."""

import os
from pathlib import Path

import pytest

from moeut_compose.spec.find import NotFound, builtin_root, find, list_specs, nearest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no folders named in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEUT_COMPOSE_PATH", raising=False)
    return tmp_path


def write(path: str, text: str = "name: x\n") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_built_in_specs_are_found_from_anywhere() -> None:
    assert find("moeut_244m", "architectures") == builtin_root("architectures") / "moeut_244m.yaml"
    aabb = builtin_root("architectures") / "ablations" / "moeut_244m_aabb.yaml"
    assert find("ablations/moeut_244m_aabb", "architectures") == aabb


@pytest.mark.parametrize(
    "name", ["moeut_244m", "architectures/moeut_244m", "architectures/moeut_244m.yaml", "moeut_244m.yaml"]
)
def test_a_built_in_answers_to_its_name_and_to_its_path(name: str) -> None:
    assert find(name, "architectures") == builtin_root("architectures") / "moeut_244m.yaml"


def test_a_path_comes_before_a_name(elsewhere: Path) -> None:
    mine = write("moeut_244m.yaml")
    assert find("moeut_244m.yaml", "architectures") == mine
    assert find(str(elsewhere / "moeut_244m.yaml"), "architectures") == elsewhere / mine


def test_named_folders_come_before_the_current_one_and_that_before_the_built_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = write("architectures/moeut_244m.yaml")
    assert find("moeut_244m", "architectures") == here
    second = write("second/architectures/moeut_244m.yaml")
    monkeypatch.setenv("MOEUT_COMPOSE_PATH", os.pathsep.join(["first", "second"]))
    assert find("moeut_244m", "architectures") == second
    first = write("first/architectures/moeut_244m.yml")
    assert find("moeut_244m", "architectures") == first


def test_a_file_in_the_current_folder_needs_no_suffix() -> None:
    mine = write("mine.yaml")
    assert find("mine", "architectures") == mine
    assert find("mine", "recipes") == mine


def test_a_folder_of_the_same_name_hides_nothing(elsewhere: Path) -> None:
    (elsewhere / "moeut_244m").mkdir()
    assert find("moeut_244m", "architectures") == builtin_root("architectures") / "moeut_244m.yaml"


def test_a_run_and_its_checkpoints_stand_for_the_spec_in_them() -> None:
    stored = write("runs/a/architecture.yaml")
    recipe = write("runs/a/recipe.yaml")
    Path("runs/a/checkpoints/step-00000010").mkdir(parents=True)
    Path("runs/a/checkpoints/latest").write_text("step-00000010")
    for name in ("runs/a", "runs/a/", "runs/a/checkpoints/step-00000010", "runs/a/checkpoints/latest"):
        assert find(name, "architectures") == stored
        assert find(name, "recipes") == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "moeut_24m",
            "moeut_24m is neither an architecture nor a file; did you mean moeut_244m or moeut_44m",
        ),
        ("MoEUT_244M", "did you mean moeut_244m"),
        ("moeut_244m_aabb", "did you mean ablations/moeut_244m_aabb?"),
        ("missing.yaml", "missing.yaml is neither an architecture nor a file"),
        ("zzz", "zzz is neither an architecture nor a file"),
        ("empty", "empty is a folder without architecture.yaml; name a file, a run or a checkpoint"),
        ("tuned", "tuned is a recipe, and an architecture is needed here"),
    ],
)
def test_what_is_not_there_is_named_with_its_neighbours(name: str, message: str) -> None:
    Path("empty").mkdir()
    write("recipes/tuned.yaml")
    with pytest.raises(NotFound) as caught:
        find(name, "architectures")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_listing_names_the_first_of_each_name() -> None:
    mine = write("architectures/deep/mine.yaml")
    shadow = write("architectures/moeut_44m.yaml")
    listed = {spec.name: spec for spec in list_specs("architectures")}
    assert listed["deep/mine"].path == mine
    assert not listed["deep/mine"].builtin
    assert listed["moeut_44m"].path == shadow
    assert not listed["moeut_44m"].builtin
    assert listed["moeut_244m"].builtin
    assert list(listed) == sorted(listed)


def test_the_built_in_folder_as_working_directory_stays_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(builtin_root("architectures").parent)
    assert all(spec.builtin for spec in list_specs("architectures"))


def test_the_architectures_of_the_contract_exist() -> None:
    sizes = ("44m", "126m", "244m", "319m", "728m", "1b")
    wanted = {f"{family}_{size}" for family in ("dense", "moeut") for size in sizes}
    wanted |= {f"sigma_moe_{size}" for size in sizes[:-1]} | {"sut_44m", "sut_244m"}
    wanted |= {f"ablations/moeut_244m_{change}" for change in ("g1", "g3", "g6", "g9", "aabb", "pre", "post")}
    wanted |= {"ablations/moeut_44m_post", "dense_tiny", "moeut_tiny", "sigma_moe_tiny", "sut_tiny"}
    assert wanted <= {spec.name for spec in list_specs("architectures")}
    assert {"default", "paper", "paper_44m", "quickstart"} <= {spec.name for spec in list_specs("recipes")}


def test_nearest_ignores_case_and_keeps_order() -> None:
    assert nearest("N_Heads", ["d_head", "n_heads", "n_experts"])[0] == "n_heads"
    assert nearest("qqq", ["n_heads"]) == []
