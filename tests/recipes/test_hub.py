import json
import os
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from galore_trainer import hub
from galore_trainer.errors import OptionError
from galore_trainer.hub import probe, require_hub
from galore_trainer.recipes import DataConfig, load_data


@pytest.fixture
def server():
    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of our own, and a hub that is out of reach."""
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(hub, "probe", lambda endpoint: "no route")
    return tmp_path


def test_any_answer_means_that_the_hub_is_there(server):
    assert probe(server) is None


def test_closed_port_and_silent_server_are_told_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        start = time.monotonic()
        assert probe(f"http://127.0.0.1:{port}")
        assert time.monotonic() - start < 4
    assert probe(f"http://127.0.0.1:{port}")


def test_out_of_reach_without_a_copy_names_option_and_way_out(caches):
    with pytest.raises(OptionError, match=r"model_name_or_path: got 'a/b'.*no route.*Use the embedded one\."):
        require_hub("model_name_or_path", "a/b", "model", "Use the embedded one.")


def test_copy_of_a_model_in_the_cache_is_enough(caches):
    snapshot = caches / "hub" / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert require_hub("model_name_or_path", "a/b", "model", "") is False


def test_offline_switch_asks_nobody(caches, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "probe", lambda endpoint: pytest.fail("asked"))
    with pytest.raises(OptionError, match="HF_HUB_OFFLINE is set"):
        require_hub("data.source", "a/b", "dataset", "")


def test_data_set_out_of_reach_points_to_a_local_file(caches):
    start = time.monotonic()
    with pytest.raises(OptionError, match=r"data\.source: got 'openai/gsm8k'.*data\.source=path/to/gsm8k\.jsonl"):
        load_data(DataConfig(source="openai/gsm8k"))
    assert time.monotonic() - start < 5


def test_cached_data_set_loads_without_a_network(caches, capsys):
    import datasets

    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(6)]
    source = caches / "rows.jsonl"
    datasets.Dataset.from_list(rows).to_json(source)
    datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(caches / "made"))
    (version,) = (caches / "made" / "json").glob("*/*/*/dataset_info.json")
    copy = caches / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / "abc"
    shutil.copytree(version.parent, copy)
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**info, "config_name": "main"}))
    os.rename(copy / "json-train.arrow", copy / "gsm8k-train.arrow")

    start = time.monotonic()
    data = load_data(DataConfig(source="openai/gsm8k", eval_samples=2))
    assert time.monotonic() - start < 5
    assert {example.id for example in data.train + data.eval} == {f"gsm8k/train/{i}" for i in range(6)}
    assert datasets.config.HF_HUB_OFFLINE is False
    with pytest.raises(OptionError, match=r"data\.revision: got 'v2'"):
        load_data(DataConfig(source="openai/gsm8k", revision="v2"))
    with pytest.raises(OptionError, match=r"data\.subset: got 'socratic'.*'main'"):
        load_data(DataConfig(source="openai/gsm8k", subset="socratic"))


class TestLoading:
    """What reaches ``datasets.load_dataset``, and what becomes of its errors."""

    @pytest.fixture
    def calls(self, monkeypatch):
        import datasets

        calls = []

        def load_dataset(path, name=None, split=None, revision=None):
            calls.append((path, name, split, revision))
            if split == "dev":
                raise ValueError("Unknown split \"dev\". Should be one of ['train', 'test'].")
            if name == "chess":
                raise ValueError("BuilderConfig 'chess' not found. Available: ['main', 'socratic']")
            if path.endswith("script"):
                raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
            start = 0 if split == "train" else 8
            return [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(start, start + 10)]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr("galore_trainer.recipes.hub_source.require_dataset", lambda *arguments: True)
        return calls

    def test_gsm8k_takes_its_main_configuration_and_holds_out(self, calls):
        data = load_data(DataConfig(source="openai/gsm8k", eval_samples=3))
        assert calls == [("openai/gsm8k", "main", "train", None)]
        assert (data.task, len(data.train), len(data.eval)) == ("gsm8k", 7, 3)

    def test_named_split_is_evaluated_on(self, calls):
        data = load_data(DataConfig(source="a/b", subset="s", revision="r", eval_split="test", eval_samples=None))
        assert calls == [("a/b", "s", "train", "r"), ("a/b", "s", "test", "r")]
        assert (len(data.train), len(data.eval)) == (8, 10)

    def test_a_data_set_that_is_a_script_is_read_from_its_converted_copy(self, calls):
        columns = {"mr": "question", "ref": "answer"}
        load_data(DataConfig(source="tuetschek/e2e_nlg", task="nlg", columns=columns, eval_samples=2))
        load_data(DataConfig(source="tuetschek/e2e_nlg", task="nlg", columns=columns, eval_samples=2, revision="r"))
        assert calls == [("tuetschek/e2e_nlg", None, "train", r) for r in ("refs/convert/parquet", "r")]

    def test_subset_belongs_to_the_training_source(self, calls):
        load_data(DataConfig(source="a/b", subset="s", eval_source="c/d", eval_split="test"))
        assert calls == [("a/b", "s", "train", None), ("c/d", None, "test", None)]

    @pytest.mark.parametrize(
        ("settings", "option", "said"),
        [
            ({"split": "dev"}, "data.split", "Should be one of"),
            ({"eval_split": "dev"}, "data.eval_split", "Should be one of"),
            ({"subset": "chess"}, "data.subset", "socratic"),
            ({"source": "a/script"}, "data.source", "refs/convert/parquet"),
        ],
    )
    def test_errors_name_the_option(self, calls, settings, option, said):
        with pytest.raises(OptionError) as error:
            load_data(DataConfig(**{"source": "a/b", **settings}))
        assert error.value.option == option
        assert said in str(error.value)
