"""Where tests keep what they cache, and which of them are slow. The fixtures are in shared_fixtures.py."""

import gc
import os
import tempfile

# Read when the libraries are imported, so set before.
os.environ["RANKFRONT_CACHE"] = tempfile.mkdtemp(prefix="rankfront-tests-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["RANKFRONT_CACHE"], "datasets")
os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["RANKFRONT_CACHE"], "modules")
# A compiler that was killed at work leaves half a header in the cache that all of a user's processes share.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["RANKFRONT_CACHE"], "inductor")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of commands too: tiny matrices run fastest on it

# What `make quick` leaves out: files that launch studies again and again, or end processes, or build wheels, all of
# healing, and laws over fitted methods but for one of each family.
SLOW = {
    "test_answer", "test_cache_faults", "test_cluster", "test_compiled", "test_compress", "test_end_to_end",
    "test_export", "test_faults", "test_fidelity", "test_folder", "test_front_healing", "test_hf", "test_hostile",
    "test_integers", "test_joined", "test_kill", "test_large", "test_latency", "test_limits", "test_opening",
    "test_rankfront_sampler", "test_rankfront_study", "test_ray", "test_refit", "test_retries", "test_samplers",
    "test_slice", "test_startup", "test_storage_faults", "test_timing", "test_wheel",
}  # fmt: skip
ONE_OF_A_FAMILY = {"lrt-snmf", "wara", "tensor-train", "compot", "dsformer", "oats", "rtn-int8", "lqer-int4"}


def pytest_collection_modifyitems(items):
    for item in items:
        stem = item.path.stem
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        of_many = stem == "test_fitted_laws" and name not in ONE_OF_A_FAMILY
        if stem in SLOW or stem.startswith("test_heal") or of_many:
            item.add_marker("slow")


def pytest_configure(config):
    """The process that only hands files out to others imports nothing of what they test, so they begin at once."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        gc.disable()
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish():
    """What was imported and collected lives until the end: to look through it for garbage, again and again, took a
    tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.enable()
