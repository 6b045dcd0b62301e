"""Nothing in a checkpoint from elsewhere runs, whichever file it is in and whichever door it comes through."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from galore_trainer import GaLoreConfig, OptionError, check_checkpoint, galore_plugin
from galore_trainer.cli.main import main
from galore_trainer.hf.reading import trainer_state
from galore_trainer.hf.unpickling import check_weights
from galore_trainer.run.launching.checkpoints import seal

SPEC = importlib.util.spec_from_file_location("payloads", Path(__file__).parents[1] / "helpers" / "payloads.py")
assert SPEC is not None
assert SPEC.loader is not None
payloads = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(payloads)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each backend."""
    folder = tmp_path_factory.mktemp("whole")
    return {backend: payloads.make_checkpoint(backend, folder / backend) for backend in payloads.BACKENDS}


@pytest.fixture
def copy(whole: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda backend: shutil.copytree(whole[backend], tmp_path / "run" / "checkpoint-6", dirs_exist_ok=True)


def test_checkpoints_of_every_kind_pass() -> None:
    folders = sorted(payloads.FIXTURES.glob("*/checkpoint-*"))
    assert len(folders) >= 10
    for folder in folders:
        check_checkpoint(folder)


@pytest.mark.parametrize("backend", payloads.BACKENDS)
def test_a_whole_checkpoint_passes_and_a_payload_in_any_file_does_not(backend, copy, tmp_path: Path) -> None:
    check_checkpoint(copy(backend))
    mark = tmp_path / "mark"
    names = [path.relative_to(tmp_path / "run" / "checkpoint-6") for path in payloads.pickled(copy(backend))]
    assert len(names) >= 4
    for name in names:
        for bare in (False, True):
            folder = copy(backend)
            payloads.plant(folder / name, mark, bare=bare)
            with pytest.raises(OptionError) as error:
                check_checkpoint(folder)
            blamed = Path(error.value.got)
            assert blamed in (folder / name, (folder / name).with_name(".metadata"))
            assert not mark.exists()
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "config.json"])
def test_a_pickle_in_the_place_of_another_file_is_named(name: str, copy, tmp_path: Path) -> None:
    folder = copy("single")
    payloads.plant(folder / name, tmp_path / "mark", bare=True)
    with pytest.raises(OptionError, match=name):
        check_checkpoint(folder)
    if name == "model.safetensors":
        with pytest.raises(OptionError, match=name):
            check_weights(folder, "model_name_or_path")
    assert not (tmp_path / "mark").exists()


def doors(checkpoint: Path, config: Path, output: Path) -> list[list[str]]:
    """Command lines that read a checkpoint."""
    return [
        ["state", "export", str(checkpoint), str(output)],
        ["state", "import", str(checkpoint), str(config), "--output-dir", str(output)],
        ["train", str(config), "--output-dir", str(output), "--resume", str(checkpoint)],
        ["train", str(config), "--output-dir", str(checkpoint.parent), "--resume", "auto"],
    ]


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"model_name_or_path: {tiny_model_dir}\nuse_cpu: true\nmax_steps: 6\ndisable_tqdm: true\n")
    return path


@pytest.mark.parametrize("backend", ["single", "fsdp2", "zero3"])
def test_no_door_lets_a_payload_in(backend, copy, config, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, mark = copy(backend), tmp_path / "mark"
    last = list(payloads.pickled(folder))[-2]
    payloads.plant(last, mark)
    seal(folder)
    for words in doors(folder, config, tmp_path / "output"):
        if words[1] == "import" and not (folder / "optimizer.pt").is_file():
            continue  # it takes whole checkpoints alone
        assert main(words) == 2, words
        told = capsys.readouterr().err
        assert "checkpoint-6" in told
        assert "could run code" in told or "cannot be read" in told
        assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_model_with_a_payload_is_refused_by_eval(name, bare, tiny_model_dir, tmp_path, capsys) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    payloads.plant(folder / name, mark, bare=bare)
    assert main(["eval", str(folder), "quickstart", "use_cpu=true"]) == 2
    assert name in capsys.readouterr().err
    assert not mark.exists()


def test_weights_of_the_time_before_zip_files_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check_weights(tmp_path, "model_name_or_path")


def test_the_plugin_checks_what_the_trainer_is_to_resume(copy, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, resume_from_checkpoint=str(copy("single")))
    galore_plugin(GaLoreConfig(), args)
    payloads.plant(tmp_path / "run" / "checkpoint-6" / "optimizer.pt", tmp_path / "mark")
    with pytest.raises(OptionError, match=r"resume_from_checkpoint.*optimizer\.pt"):
        galore_plugin(GaLoreConfig(), args)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_step", "../../x"),
        ("global_step", -1),
        ("global_step", 1.5),
        ("global_step", True),
        ("global_step", None),
        ("global_step", 10**400),
        ("best_global_step", "../x"),
        ("best_model_checkpoint", "../../elsewhere"),
        ("best_model_checkpoint", 3),
        ("max_steps", "7"),
        ("epoch", "many"),
        ("log_history", [{"step": "../x"}]),
        ("log_history", {}),
        ("stateful_callbacks", []),
        ("is_world_process_zero", 1),
        ("trial_name", 3),
        ("no_such_field", 1),
    ],
)
def test_fields_of_the_trainer_state_are_what_the_trainer_writes(field, value, copy, tmp_path: Path) -> None:
    folder = copy("single")
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(OptionError, match=r"trainer_state\.json") as error:
        check_checkpoint(folder)
    assert field in str(error.value) or "cannot be read" in str(error.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000, '{"global_step": ' + "9" * 5000 + "}", "\xff"])
def test_a_trainer_state_that_is_none_is_named(text: str, copy) -> None:
    folder = copy("single")
    (folder / "trainer_state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OptionError, match=r"trainer_state\.json"):
        trainer_state(folder)


def test_no_field_leads_out_of_the_output_folder(copy, config, tmp_path: Path, capsys) -> None:
    folder = copy("single")
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "global_step": "../../x"}))
    seal(folder)
    before = set(tmp_path.rglob("*"))
    for words in doors(folder, config, tmp_path / "deep" / "output")[:-1]:  # 'auto' may start from the beginning
        assert main(words) == 2, words
        assert "trainer_state.json" in capsys.readouterr().err
    assert {p for p in tmp_path.rglob("*") if "deep" not in p.parts} == before
    assert not any((tmp_path / "deep").rglob("*"))


@pytest.mark.parametrize("tag", ["../../other", "..", "/etc", "global_step*", "", "universal"])
def test_deepspeed_is_not_led_elsewhere(tag: str, copy) -> None:
    folder = copy("zero2")
    (folder / "latest").write_text(tag)
    with pytest.raises(OptionError, match="latest"):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", ["../x.bin", "/tmp/x.bin", "..", "a/b.bin", 3, None])
def test_an_index_names_files_beside_it(name: Any, copy) -> None:
    folder = copy("single")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(OptionError, match=r"index\.json"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    "change", [{"relative_path": "../../x"}, {"relative_path": Path("..") / "x"}, {"transform_descriptors": ["zstd"]}]
)
def test_dcp_names_files_beside_it(change: dict[str, Any], copy) -> None:
    import dataclasses

    path = copy("fsdp2") / "optimizer_0" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.storage_data = {i: dataclasses.replace(s, **change) for i, s in metadata.storage_data.items()}
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(OptionError, match="metadata"):
        check_checkpoint(path.parents[1])


def test_a_path_in_the_place_of_a_name_is_checked_as_well(copy, tmp_path: Path) -> None:
    import dataclasses

    folder = copy("fsdp2")
    data = next((folder / "optimizer_0").glob("*.distcp"))
    payloads.plant(data, tmp_path / "mark")
    path = data.with_name(".metadata")
    metadata = pickle.loads(path.read_bytes())
    as_path = {i: dataclasses.replace(s, relative_path=Path(s.relative_path)) for i, s in metadata.storage_data.items()}
    metadata.storage_data = as_path
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(OptionError, match=data.name):
        check_checkpoint(folder)


def test_links_are_followed_as_a_reader_follows_them(copy, tmp_path: Path) -> None:
    folder = copy("fsdp2")
    shutil.move(folder / "optimizer_0", tmp_path / "elsewhere")
    (folder / "optimizer_0").symlink_to(tmp_path / "elsewhere")
    check_checkpoint(folder)
    payloads.plant(tmp_path / "elsewhere" / ".metadata", tmp_path / "mark")
    with pytest.raises(OptionError, match="metadata"):
        check_checkpoint(folder)
    assert not (tmp_path / "mark").exists()


def test_the_best_checkpoint_is_checked_too(copy, whole, tmp_path: Path) -> None:
    folder = copy("single")
    best = shutil.copytree(whole["single"], tmp_path / "other" / "checkpoint-2")
    path = folder / "trainer_state.json"
    state = {**json.loads(path.read_text()), "best_model_checkpoint": str(best), "best_global_step": 2}
    path.write_text(json.dumps(state))
    check_checkpoint(folder)
    payloads.plant(best / "optimizer.pt", tmp_path / "mark")
    with pytest.raises(OptionError, match="checkpoint-2"):
        check_checkpoint(folder)


def test_arguments_that_nobody_reads_may_be_of_any_package(copy) -> None:
    folder = copy("single")
    torch.save(TrainingArguments(str(folder), use_cpu=True), folder / "training_args.bin")
    check_checkpoint(folder)
    torch.save(SimpleNamespace(x=1), folder / "training_args.bin")
    with pytest.raises(OptionError, match=r"training_args\.bin"):
        check_checkpoint(folder)
