"""``push_to_hub``: what is asked before training, and what is uploaded after it; no request leaves this process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from galore_trainer import OptionError
from galore_trainer.cli.main import main
from galore_trainer.run.results.publish import Destination, check_publish, publish
from galore_trainer.run.settings.arguments import training_arguments
from galore_trainer.run.settings.run_config import RunConfig

USER = {"name": "ann", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


def config(output: Path | str = "runs/demo", **training: Any) -> RunConfig:
    return RunConfig(training={"push_to_hub": True, "use_cpu": True, **training}, output_dir=str(output))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that remembers what it was asked for."""
    hub = SimpleNamespace(user=USER, failure=None, asked=[], error=None)

    class Api:
        def whoami(self) -> Any:
            if hub.error:
                raise hub.error
            return hub.user

        def __getattr__(self, name: str) -> Any:
            def ask(*words: Any, **settings: Any) -> str:
                hub.asked.append((name, words, settings))
                if hub.error:
                    raise hub.error
                return "https://hub/ann/demo"

            return ask

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("galore_trainer.hub.probe", lambda endpoint: hub.failure)
    return hub


def test_without_push_to_hub_nothing_is_asked(hub: SimpleNamespace) -> None:
    hub.failure = "no route"
    assert check_publish(config(push_to_hub=False)) is None


def test_without_a_network_it_is_said_before_training(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failure = "no route"
    with pytest.raises(OptionError, match=r"push_to_hub.*no route.*hf upload OWNER/NAME .*demo/model --exclude"):
        check_publish(config())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OptionError, match="HF_HUB_OFFLINE is set"):
        check_publish(config())


def test_without_a_login_that_may_write_it_is_said_before_training(hub: SimpleNamespace) -> None:
    hub.user = {**USER, "auth": {"accessToken": {"role": "read"}}}
    with pytest.raises(OptionError, match="token of ann may only read"):
        check_publish(config())
    hub.error = RuntimeError("Invalid user token.")
    with pytest.raises(OptionError, match=r"Invalid user token\. Set the environment variable HF_TOKEN"):
        check_publish(config())


@pytest.mark.parametrize(
    ("settings", "repo_id"),
    [({}, "ann/demo"), ({"hub_model_id": "tiny"}, "ann/tiny"), ({"hub_model_id": "lab/tiny"}, "lab/tiny")],
)
def test_where_a_model_goes(settings: dict[str, Any], repo_id: str, hub: SimpleNamespace) -> None:
    found = check_publish(config(hub_private_repo=True, hub_revision="v1", hub_strategy="end", **settings))
    assert found == Destination(repo_id=repo_id, private=True, revision="v1")
    assert not hub.asked  # nothing was made


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hub_strategy", "every_save"),
        ("hub_strategy", "all_checkpoints"),
        ("hub_always_push", True),
        ("hub_model_id", "bob/tiny"),
        ("hub_model_id", "a b"),
        ("hub_model_id", "../x"),
        ("hub_model_id", "a/b/c"),
    ],
)
def test_what_asks_for_something_else_is_refused(option: str, value: Any, hub: SimpleNamespace) -> None:
    with pytest.raises(OptionError) as error:
        check_publish(config(**{option: value}))
    assert error.value.option == option


def test_the_model_its_tokenizer_and_its_card_are_uploaded_and_nothing_else(hub: SimpleNamespace, tmp_path) -> None:
    folder = tmp_path / "run" / "model"
    wanted = {
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "spiece.model",
        "chat_template.jinja",
        "README.md",
    }
    page = publish(Destination(repo_id="ann/demo", private=None, revision="v1"), folder)
    assert page == "https://hub/ann/demo"
    assert [name for name, *_ in hub.asked] == ["create_repo", "create_branch", "upload_folder"]
    settings = hub.asked[-1][2]
    assert settings["folder_path"] == folder
    local = {"training_args.bin", "optimizer.pt", "pytorch_model.bin", "run.py", "predictions.jsonl", "config.yaml"}
    assert set(filter_repo_objects(wanted | local, allow_patterns=settings["allow_patterns"])) == wanted


def test_an_upload_that_fails_says_where_the_model_is(hub: SimpleNamespace, tmp_path: Path) -> None:
    hub.error = ConnectionError("gone")
    with pytest.raises(RuntimeError, match=rf"the model is in {tmp_path}, but was not uploaded: gone\. Try: hf upload"):
        publish(Destination(repo_id="ann/demo", private=None, revision=None), tmp_path)


def test_the_trainer_is_not_asked_to_upload() -> None:
    assert training_arguments(config()).push_to_hub is False


def test_a_run_asks_before_it_trains_and_uploads_after_it(
    hub: SimpleNamespace, tiny_model_dir, tmp_path, capsys
) -> None:
    path, output = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(
        f"model_name_or_path: {tiny_model_dir}\npush_to_hub: true\nmax_steps: 1\nuse_cpu: true\n"
        "save_strategy: 'no'\ndata: {train_samples: 4, eval_samples: 0}\n"
    )
    words = ["train", str(path), "--output-dir", str(output)]
    hub.failure = "no route"
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 2
        assert "push_to_hub" in capsys.readouterr().err
    assert not output.exists()
    hub.failure = None
    assert main([*words, "--dry-run"]) == 0
    assert "to ann/run" in capsys.readouterr().out
    assert not hub.asked
    assert main(words) == 0
    assert "https://hub/ann/demo" in capsys.readouterr().out
    assert [name for name, *_ in hub.asked] == ["create_repo", "upload_folder"]
    folder = hub.asked[-1][2]["folder_path"]
    assert folder == output / "model"
    assert "fine-tuned with" in (folder / "README.md").read_text()
