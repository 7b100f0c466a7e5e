"""The content of an export, refused inputs, and the import (transformers: test_transformers.py). The `generate`
command."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import warm_processes
from exported_models import ROOT, TEXTS, VARIANTS, exported_in_shards, trained
from safetensors.torch import load_file
from small_jobs import flip_a_bit
from transformers import AutoModelForCausalLM, AutoTokenizer

from titan_peer.checkpoint.files import manifest_entries, verify, write_manifest
from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.commands import main as cli
from titan_peer.common.errors import UserError
from titan_peer.config.parse import load_config
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.distributed.world import init_world
from titan_peer.inference.generator import Generator, SamplingParams
from titan_peer.model import ModelArgs
from titan_peer.sharing.export import export_checkpoint, quantize_rows, transformers_config
from titan_peer.sharing.import_model import import_model
from titan_peer.trainer import Trainer


@pytest.fixture(scope="module", autouse=True)
def from_the_repository_root():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(variant, tmp_path_factory)


@pytest.fixture(scope="module")
def exported(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_in_shards(variant, tmp_path_factory)


def in_transformers(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def test_large_models_are_written_in_shards_with_an_index(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index.values())
    for path in files:
        assert path.stat().st_mode == (exported / "config.json").stat().st_mode  # readable by other users
        tensors = load_file(path)
        assert all(index[name] == path.name for name in tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 300_000


def test_import_gives_back_every_number_and_training_goes_on(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    back = import_model(exported, tmp_path / "back")
    assert back == tmp_path / "back/checkpoint/step-4"
    ours, _, _ = load_model_for_inference(checkpoint)
    again, _, _ = load_model_for_inference(back)
    assert ours.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))
    config = load_config(["--job.config_file", str(tmp_path / "back/config.toml"), "--training.steps", "6"])
    job = Trainer(config, init_world(config.parallelism))
    assert job.step == 4
    assert job.train() == 0 and job.step == 6


def test_what_transformers_saved_again_can_be_imported_and_trained(
    checkpoint: Path, exported: Path, tmp_path: Path, capsys, caplog
) -> None:
    model = in_transformers(exported)
    with torch.no_grad():
        model.norm.weight.mul_(1.5)  # as if it had been trained
    model.save_pretrained(tmp_path / "again")
    message = failure(capsys, "import", "--input", tmp_path / "again", "--output", tmp_path / "back")
    assert "tokenizer.json: does not exist; save the tokenizer there too" in message
    AutoTokenizer.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path / "again")
    with caplog.at_level("INFO", "titan_peer"):
        back = import_model(tmp_path / "again", tmp_path / "back")
    assert "has no config.toml" in caplog.text and "training starts at step 0" in caplog.text
    theirs, job, tokenizer = load_model_for_inference(back)
    ours, original, our_tokenizer = load_model_for_inference(checkpoint)
    wanted = ours.state_dict()
    wanted["norm.weight"] = wanted["norm.weight"] * 1.5
    assert wanted.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in theirs.state_dict().items())
    for key in ("mla", "peer", "max_seq_len", "norm_eps", "init_std", "tie_embeddings", "ffn_hidden_dim"):
        assert getattr(job.model, key) == getattr(original.model, key)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (our_tokenizer.bos_id, our_tokenizer.eos_id)
    assert tokenizer.encode_batch(TEXTS) == our_tokenizer.encode_batch(TEXTS)

    words = [
        "--job.config_file",
        str(tmp_path / "back/config.toml"),
        "--data.sources.0.path",
        f"{ROOT}/assets/sample_text/train.jsonl",
    ]
    config = load_config([*words, "--training.steps", "1", "--training.seq_len", "32", "--compile.enable", "false"])
    job_again = Trainer(config, init_world(config.parallelism))
    torch.testing.assert_close(job_again.model.norm.weight, wanted["norm.weight"])
    assert job_again.train() == 0 and job_again.step == 1


@pytest.mark.parametrize("table_dtype", ["int8", "float8_e4m3"])
def test_quantised_tables_take_a_byte_a_number_and_are_rounded_only(
    checkpoint: Path, table_dtype: str, tmp_path: Path
) -> None:
    export_checkpoint(checkpoint, tmp_path / "small", table_dtype=table_dtype)  # type: ignore[arg-type]
    weights = load_file(tmp_path / "small/model.safetensors")
    exact, _, _ = load_model_for_inference(checkpoint)
    back, _, _ = load_model_for_inference(import_model(tmp_path / "small", tmp_path / "back"))
    tables = {name: table for name, table in exact.state_dict().items() if "expert_" in name}
    for name, table in tables.items():
        assert weights[name].itemsize == 1 and weights[f"{name}_scale"].shape == table.shape[:2]
        largest = table.abs().amax(dim=-1, keepdim=True)
        if table_dtype == "int8":  # half a step
            bound = largest / 127 * 0.51
        else:  # half of the last of three bits after the point; below 2^-6 the steps are equal
            bound = table.abs() / 16 * 1.01 + largest / 448 * 2**-9
        assert ((back.state_dict()[name] - table).abs() <= bound).all()
    small, tokens = in_transformers(tmp_path / "small"), torch.arange(40)[None]
    assert all(small.state_dict()[name].itemsize == 1 for name in tables)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, back(tokens), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(back(tokens), exact(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("table_dtype", ["int8", "float8_e4m3"])
def test_rows_of_zeros_and_of_tiny_numbers_are_quantised_as_well_as_others(table_dtype: str) -> None:
    torch.manual_seed(0)
    table = torch.randn(6, 2, 32) * torch.tensor([0, 1e-30, 1e-12, 1e-6, 1, 1e6])[:, None, None]
    codes, scale = quantize_rows(table, table_dtype)  # type: ignore[arg-type]
    numbers = codes.view(torch.float8_e4m3fn) if table_dtype == "float8_e4m3" else codes
    back = numbers.float() * scale[..., None]
    error = (back - table).abs().amax(-1) / table.abs().amax(-1).clamp_min(1e-38)
    assert (error <= (1 / 127 if table_dtype == "int8" else 1 / 16)).all() and torch.equal(back[0], table[0])


def test_the_model_card_says_how_it_was_made_and_what_was_measured(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoint/step-4")
    records = [
        {"step": 2, "validation_loss": 5.0},
        {"step": 4, "validation_loss": 4.25, "loss": 3.0},
        {"step": 4, "evaluation/tasks/copy/acc": 0.75, "expert_usage/layer_1/share_used": 0.5},
        {"step": 4, "expert_usage/layer_1/head_0/gini": 0.25},
        {"step": 6, "validation_loss": 1.0},
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records) + '{"step": 7, "va', encoding="utf-8"
    )
    export_checkpoint(run / "checkpoint/step-4", tmp_path / "export", license_name="mit")
    card = (tmp_path / "export/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "\nlicense: mit\n" in card
    assert "- **Tokens**: 512" in card and "- **Step**: 4 of 4" in card
    assert "| validation_loss | 4.25 | 4 |" in card
    assert (
        "| evaluation/tasks/copy/acc | 0.75 | 4 |" in card and "| expert_usage/layer_1/share_used | 0.5 | 4 |" in card
    )
    assert "head_0" not in card  # a table a person can read


def test_the_code_of_the_docs_and_of_the_model_card_runs_without_a_question(
    exported: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debug_model_export").symlink_to(exported)
    pages = (
        (exported / "README.md").read_text(encoding="utf-8"),
        (ROOT / "docs/sharing.md").read_text(encoding="utf-8"),
    )
    for page in pages:
        (code,) = re.findall(r"^```(?:python)?\n(from transformers .*?)^```", page, re.M | re.S)
        exec(code.replace("THIS_FOLDER", "debug_model_export"), {})
        shown = capsys.readouterr()
        assert "In the beginning" in shown.out and "custom code" not in shown.out + shown.err


# ---- damaged and foreign input


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


@pytest.fixture
def broken(exported: Path, tmp_path: Path) -> Path:
    """A copy of an export, which a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "broken"))


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_neither_exported_nor_imported(
    checkpoint: Path, exported: Path, tmp_path: Path, capsys
) -> None:
    model = in_transformers(exported)
    model.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path / "again")
    copy = Path(shutil.copytree(checkpoint, tmp_path / "step-4"))
    (copy / "tokenizer").mkdir(exist_ok=True)
    (copy / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    larger = tokenizers.Tokenizer.from_file(str(tmp_path / "again/tokenizer.json"))
    larger.add_tokens(["another entry"])
    for folder in (tmp_path / "again", copy / "tokenizer"):
        larger.save(str(folder / "tokenizer.json"))
    job = (copy / "config.toml").read_text(encoding="utf-8")
    (copy / "config.toml").write_text(job.replace('tokenizer_path = "byte"', 'tokenizer_path = "t"'), encoding="utf-8")
    (copy / "manifest.json").unlink()
    write_manifest(copy, manifest_entries(copy, [path for path in copy.rglob("*") if path.is_file()]))
    vocab_size = model.config.vocab_size
    for words in (("import", "--input", tmp_path / "again"), ("export", "--checkpoint", copy)):
        message = failure(capsys, *words, "--output", tmp_path / "out").replace(",", "")
        assert f"model.vocab_size = {vocab_size}: the tokenizer" in message and f"has ids up to {vocab_size}" in message
        assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(checkpoint: Path, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "step-4"))
    data = next(copy.glob("*_model_*.distcp"))
    flip_a_bit(data)
    message = failure(capsys, "export", "--checkpoint", copy, "--output", tmp_path / "out")
    assert "damaged" in message and data.name in message and "CRC-32" in message
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out*")) == []


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, capsys) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/pytorch_model.bin").write_bytes(b"x")
    for command in (["export", "--output", tmp_path / "out"], ["generate", "--prompt", "x"]):
        message = failure(capsys, *command, "--checkpoint", tmp_path / "foreign")
        assert "foreign: has no complete checkpoint in it; give a job's folder" in message
        assert "does not exist" in failure(capsys, *command, "--checkpoint", tmp_path / "nowhere")


def test_nothing_is_written_over(checkpoint: Path, exported: Path, capsys) -> None:
    message = failure(capsys, "export", "--checkpoint", checkpoint, "--output", exported)
    assert "exists already" in message


@pytest.mark.parametrize("variant", ["two axes"], indirect=True)
def test_places_where_no_folder_can_be_put_are_refused_before_work(
    checkpoint: Path, exported: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    export, back = ("export", "--checkpoint", checkpoint), ("import", "--input", exported)
    for words, source in ((export, checkpoint), (back, exported)):
        for place, problem in (
            (".", "is the folder you are in; give a new folder"),
            ("", "is the folder you are in; give a new folder"),
            ("..", "exists already; give a new folder"),
            ("/", "exists already; give a new folder"),
            ("file", "exists already; give a new folder"),
            ("/dev/shm" if not any(Path("/dev/shm").iterdir()) else "/proc", "mount point|exists already"),
            (source / "new", f"lies in {source}; give a folder elsewhere"),
            ("file/new", "cannot be written"),
        ):
            assert re.search(problem, failure(capsys, *words, "--output", place)), place
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    for place in ("there", "empty", "new/of/many"):
        assert cli.main(["export", "--checkpoint", str(checkpoint), "--output", place]) == 0
        assert (tmp_path / place / "model.safetensors").is_file()
    assert (tmp_path / "elsewhere/model.safetensors").is_file()


KILLED_AT = """
import os, signal, sys
from titan_peer.commands import main as cli
from titan_peer.sharing import export
from titan_peer.sharing import import_model
folder, *words = sys.argv[1:]
kills = 0
for number in range(1, 10**6, 9):  # killed when the number-th file is opened for writing
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, args):
            global seen
            if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and folder in str(args[0]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        os._exit(cli.main(words))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        break
    kills += 1
print(kills)
sys.exit(status)
"""


@pytest.mark.parametrize("variant", ["two axes"], indirect=True)
def test_killed_at_any_file_and_started_again_export_and_import_are_whole(
    checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    for words in (
        ["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "export")],
        ["import", "--input", str(exported), "--output", str(tmp_path / "back")],
    ):
        code = [sys.executable, "-c", KILLED_AT, str(tmp_path), *words]
        done = subprocess.run(
            code, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.splitlines()[-1]) >= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "export"]
    verify(tmp_path / "export")
    assert not list((tmp_path / "back").glob(".*"))
    wanted, _, _ = load_model_for_inference(checkpoint)
    again, _, _ = load_model_for_inference(tmp_path / "back/checkpoint/step-4")
    assert all(torch.equal(a, b) for a, b in zip(wanted.state_dict().values(), again.state_dict().values()))


def test_an_export_leaves_the_files_of_another_one_alone_and_removes_those_of_a_dead_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    start = f".export.partial-{socket.gethostname()}-"
    with subprocess.Popen(["sleep", "600"]) as dead:
        dead.kill()
    with subprocess.Popen(["sleep", "600"]) as other:
        for pid in (other.pid, dead.pid):
            (tmp_path / f"{start}{pid}").mkdir()
        export_checkpoint(checkpoint, tmp_path / "export")
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{start}{other.pid}", "export"]
        other.kill()


@pytest.mark.parametrize("variant", ["two axes"], indirect=True)
def test_a_disk_that_refuses_leaves_nothing_half_written(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    code = "import json, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    code += "from titan_peer.commands.main import main; print([main(words) for words in json.loads(sys.argv[1])])"
    export = ["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    back = ["import", "--input", str(exported), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([export, back])], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stdout == "[2, 2]\n" and done.returncode == 0, done.stderr
    assert done.stderr.count(f"error: --output {tmp_path / 'out'}: cannot be written") == 2
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_damaged_export_is_refused_with_the_file(
    broken: Path, damage: str, manifest: bool, tmp_path: Path, capsys
) -> None:
    file = sorted(broken.glob("*.safetensors"))[1]
    if damage == "bit":
        flip_a_bit(file, at=0.9 if manifest else 0.0)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    if not manifest:  # a copy that was made in another way, without our list of sizes and checksums
        (broken / "manifest.json").unlink()
    message = failure(capsys, "import", "--input", broken, "--output", tmp_path / "back")
    assert file.name in message
    assert not (tmp_path / "back").exists()


def test_a_foreign_or_inconsistent_export_is_refused_with_the_reason(broken: Path, tmp_path: Path, capsys) -> None:
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "manifest.json").unlink()

    def message(**changes: object) -> str:
        (broken / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return failure(capsys, "import", "--input", broken, "--output", tmp_path / "back")

    assert "config.json: model_type = 'llama': must be 'titan_peer'" in message(model_type="llama")
    assert "config.json: dim = 65" in message(dim=65)
    assert "config.json: norm_eps = 0.001, but " in message(norm_eps=1e-3)
    assert "config.json: tie_embeddings = " in message(tie_embeddings=not config["tie_embeddings"])
    (broken / "config.json").write_text("{", encoding="utf-8")
    assert "config.json: cannot be read" in failure(capsys, "import", "--input", broken, "--output", tmp_path / "back")
    (broken / "config.json").unlink()
    assert "config.json: does not exist" in failure(capsys, "import", "--input", broken, "--output", tmp_path / "back")


# ---- the generate command


@pytest.mark.parametrize("variant", ["three axes"], indirect=True)
def test_generate_writes_the_text_to_standard_output_and_the_rest_to_standard_error(checkpoint: Path) -> None:
    model, _, tokenizer = load_model_for_inference(checkpoint)
    params = SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=1)
    (wanted,) = Generator(model, tokenizer).generate([TEXTS[0]], params)
    words = ["generate", "--checkpoint", checkpoint, "--prompt", TEXTS[0], "--max-new-tokens", 12]
    words += ["--temperature", 0.8, "--top-p", 0.95, "--seed", 1]
    done = warm_processes.run(warm_processes.TITAN_PEER, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == wanted.text + "\n"
    assert "tokens in" in done.stderr and "decode attention: PyTorch" in done.stderr


def test_several_prompts_come_out_in_order_and_as_json(checkpoint: Path, capsys) -> None:
    model, _, tokenizer = load_model_for_inference(checkpoint)
    wanted = Generator(model, tokenizer).generate(TEXTS, SamplingParams(max_new_tokens=9, temperature=0))
    prompts = [word for text in TEXTS for word in ("--prompt", text)]
    words = ["generate", "--checkpoint", str(checkpoint), *prompts, "--max-new-tokens", "9", "--temperature", "0"]
    assert cli.main([*words, "--tables", "mapped"]) == 0
    assert capsys.readouterr().out == "".join(completion.text + "\n" for completion in wanted)
    assert cli.main([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["token_ids"] for line in lines] == [completion.token_ids for completion in wanted]
    assert [line["prompt"] for line in lines] == TEXTS


def test_a_conversation_keeps_its_context_until_told_to_forget(checkpoint: Path, capsys, monkeypatch) -> None:
    model, _, tokenizer = load_model_for_inference(checkpoint)
    generator, params = Generator(model, tokenizer), SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)
    first = generator.encode("Hello")
    (reply,) = generator.generate([first], params)
    (second,) = generator.generate([[*first, *reply.token_ids, *tokenizer.encode_batch([" again"])[0]]], params)
    typed = "Hello\n again\n/new\nHello\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    words = ["generate", "--checkpoint", str(checkpoint), "--interactive", "--max-new-tokens", "5"]
    assert cli.main([*words, "--temperature", "0", "--ignore-eos"]) == 0
    assert capsys.readouterr().out == f"{reply.text}\n{second.text}\n{reply.text}\n"


def test_impossible_requests_are_refused_before_the_model_is_loaded(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    anywhere = ["generate", "--checkpoint", tmp_path]
    assert "temperature = -1.0: must be" in failure(capsys, *anywhere, "--prompt", "x", "--temperature", "-1")
    assert "--num_samples 0: must be at least 1" in failure(capsys, *anywhere, "--prompt", "x", "--num-samples", "0")
    assert "--interactive: goes with none of" in failure(capsys, *anywhere, "--prompt", "x", "--interactive")


def test_a_kind_of_feed_forward_that_the_exported_code_lacks_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(ModelArgs, "feed_forward_kind", lambda args, layer: "moe" if layer else "peer")
    with pytest.raises(UserError, match="block 1 is of the kind 'moe'"):
        transformers_config(ModelArgs(), load_tokenizer("byte"), "float32", "float")
