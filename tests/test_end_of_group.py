"""What is left of the ranks' group once it has ended."""

from conftest import ROOT, run_python


def test_nothing_holds_a_group_that_has_ended(tmp_path):
    script = tmp_path / "end.py"
    script.write_text(
        "import gc, sys, weakref\n"
        f"sys.path.insert(0, {str(ROOT / 'EqM')!r})\n"
        "import torch.distributed as dist\n"
        "from runtime import distributed\n"
        "print('torch._dynamo' in sys.modules)\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "group = weakref.ref(dist.group.WORLD)\n"
        "import torch._dynamo\n"  # as training does once the group is there
        "print('torch._dynamo' in sys.modules)\n"
        "distributed.stop()\n"
        "gc.collect()\n"
        "print(group() is None)\n"
    )
    run = run_python(script, cwd=tmp_path)
    assert (run.returncode, run.stdout.split()) == (0, ["False", "True", "True"]), run.stderr
