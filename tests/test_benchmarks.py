"""The GPU benchmark on a CPU: what it needs, what it checks, and that what it reports is true."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gpu
from spo_ray.core.lm_head import base_of

from .conftest import ROOT

WITHOUT = ("ray", "vllm", "pydantic", "datasets", "pyarrow", "openai")
PAIRS = [
    {
        "prompt": f"{a} apples and {b} more?",
        "chosen": f"{a} + {b} = {a + b}.\n#### {a + b}",
        "rejected": f"#### {a * b}",
    }
    for a in range(2, 7)
    for b in range(2, 7)
]
EXACT = {"a", "c", "d"}
"""Terms without a finite difference."""


@pytest.fixture(scope="module")
def result(tmp_path_factory, toy_base):
    """One run as the command line makes it, where other packages are not installed: its output, and its JSON."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    options = ["--tiny", "--minutes", 30, "--steps", 2, "--out", folder / "out.json"]  # minutes: for a busy machine
    options += ["--model", toy_base, "--pairs", folder / "pairs.jsonl"]
    code = f"import runpy, sys\nfor name in {WITHOUT!r}: sys.modules[name] = None\n"
    code += f"sys.argv = {['gpu', *map(str, options)]!r}\nrunpy.run_module('benchmarks.gpu', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())


def rows_of(result, part):
    return [row for row in result[1]["rows"] if row["part"] == part]


def errors(result, case):
    return {row["check"]: row["error"] for row in rows_of(result, "correctness") if row["case"] == case}


@pytest.mark.parametrize(("case", "exact", "differences"), [("fp32", 5e-6, 0.01), ("bf16", 0.03, 0.03)])
def test_every_term_is_close_to_float64(result, case, exact, differences):
    found = errors(result, case)
    assert set(found) == {f"term ({term})" for term in "abcdRe"}
    for term in "abcdRe":
        assert 0 < found[f"term ({term})"] < (exact if term in EXACT else differences), term


def test_exact_terms_are_closer_than_differences_in_single_precision(result):
    differences, exact = errors(result, "fp32"), errors(result, "fp32, exact")
    assert all(10 * exact[f"term ({term})"] < differences[f"term ({term})"] for term in "bRe")


@pytest.mark.parametrize("case", ["full logits", "chunks of 7", "one chunk", "attention eager", "SDPA MATH"])
def test_log_probabilities_are_close_to_float64(result, case):
    for precision, logps, gradient in (("fp32", 1e-6, 5e-6), ("bf16", 2e-3, 0.03)):
        found = errors(result, f"{case}, {precision}")
        assert 0 < found["logps"] < logps and 0 < found["gradient"] < gradient


def test_one_shard_gives_the_gradients_of_none(result):
    assert max(errors(result, "FSDP2, fp32").values()) < 1e-6
    assert len(errors(result, "FSDP2, fp32")) == len(errors(result, "FSDP2, bf16")) == 6


def test_every_variant_is_timed_and_the_sweep_has_its_sizes(result):
    rows = [row for row in rows_of(result, "speed") if "step, s" in row]
    assert [row["case"] for row in rows if row["pairs"] == gpu.PAIRS] == [f"tiny: {name}" for name in gpu.VARIANTS]
    swept = [row["tokens per backward"] for row in rows if row["pairs"] != gpu.PAIRS]
    assert swept == [32, 512] * 2  # 1 and 16 pairs of 32 tokens a side
    for row in rows:
        sides = 1 if row["case"] == "tiny: SFT" else 2
        assert row["tokens/s"] == pytest.approx(row["pairs"] * 32 * sides / row["step, s"])
        assert 0 < row["MFU"] < 1 and row["of DPO"] > 0


def test_a_unit_of_arithmetic_is_a_forward_of_one_sequence():
    """Against PyTorch's own count, which knows neither causal attention nor that the prompt has no logits."""
    from torch.utils.flop_counter import FlopCounterMode

    steps = gpu.Steps("tiny", "cpu", True, 1.0)
    ids = steps.batch["chosen_input_ids"][:1]
    base_of(steps.model).set_attn_implementation("eager")  # SDPA's products on a CPU are not counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        steps.model(input_ids=ids)
    layers, width, vocabulary, length = gpu.TINY[3], gpu.TINY[1], gpu.TINY[0], ids.shape[1]
    prompt_logits, upper_half = 2 * 16 * width * vocabulary, 2 * layers * width * length**2
    assert steps.unit == pytest.approx(counter.get_total_flops() - prompt_logits - upper_half, rel=0.01)


@pytest.mark.parametrize(("name", "parameters"), [("Qwen2.5-0.5B", 494_032_768), ("Qwen2.5-1.5B", 1_543_714_304)])
def test_shapes_have_the_parameters_of_the_published_models(name, parameters):
    policy = gpu.make_policy(gpu.SHAPES[name], "meta")
    assert sum(p.numel() for key, p in policy.named_parameters() if ".lora_" not in key) == parameters


def test_gradients_of_the_plain_loop_are_those_of_the_project():
    steps, found = gpu.Steps("tiny", "cpu", True, 1.0), []
    for gradients, last in ((steps.spo, gpu.DPO), (steps.plain, "DPO")):
        steps.optimizer.zero_grad()
        gradients(steps.batch, 4, last)
        found.append(torch.cat([p.grad.flatten() for p in steps.model.parameters()]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


def test_trainings_of_real_weights_start_at_the_models_own_log_probabilities(result, toy_base, chat):
    model, rows = AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32), rows_of(result, "real weights")
    for side in ("chosen", "rejected"):
        logps = []
        for pair in PAIRS[:16]:
            prompt, answer = chat.prompt_ids(pair["prompt"]), chat.completion_ids(pair[side])
            with torch.no_grad():
                every = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps.append(every.gather(1, torch.tensor(answer)[:, None]).sum().item())
        starts = [row[side] for row in rows if row.get("step") == 0]
        assert len(starts) == 2 and starts == pytest.approx([sum(logps) / 16] * 2, rel=0.01)
    for method in ("DPO", "SPO"):
        steps = [row for row in rows if row["case"] == method and "step" in row]
        assert [row["step"] for row in steps] == [0, 1, 2] and steps[0]["chosen change"] == 0
        assert steps[2]["chosen"] - steps[0]["chosen"] == pytest.approx(steps[2]["chosen change"]) != 0
        assert len([row for row in rows if row["case"] == method and row.get("greedy")]) == 3


def test_every_result_is_in_the_printed_tables(result):
    printed, data = result
    assert len([line for line in printed.splitlines() if line.startswith("| ")]) == len(data["rows"]) + 3 * 2
    assert data["machine"]["torch"] == torch.__version__


def test_without_time_every_case_is_named_and_none_is_run(tmp_path, capsys):
    assert gpu.main(["--tiny", "--minutes", "0", "--out", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["note"] for row in rows} == {"no time left"} and len(rows) > 30
    assert "| FSDP2, bf16 | no time left |" in capsys.readouterr().out


def test_a_failing_case_is_a_row_and_the_others_still_run(tmp_path, monkeypatch, capsys):
    def broken(self, case):
        raise RuntimeError(f"no result for {case}")

    monkeypatch.setattr(gpu, "speed", lambda device, tiny: iter([("later", lambda: [{"case": "later", "done": 1}])]))
    monkeypatch.setattr(gpu, "correctness", lambda device, tiny: iter([("first", lambda: broken(None, "first"))]))
    assert gpu.main(["--tiny", "--out", str(tmp_path / "out.json")]) == 1
    first, later = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert first["failed"] == "RuntimeError: no result for first" and later["done"] == 1


def test_a_gpu_is_required_without_tiny(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "use --tiny" in capsys.readouterr().err
