"""Which checkpoint a name stands for."""

from embedtune.cli.paths import requeued_checkpoint


def test_the_last_requeueing_has_the_highest_number(tmp_path):
    assert requeued_checkpoint(tmp_path / "nowhere") is None
    for name in ("last.ckpt", "hpc_ckpt_.ckpt", "hpc_ckpt_11.ckpt.part"):
        (tmp_path / name).touch()
    assert requeued_checkpoint(tmp_path) is None
    for number in (2, 10):
        (tmp_path / f"hpc_ckpt_{number}.ckpt").touch()
    assert requeued_checkpoint(tmp_path) == tmp_path / "hpc_ckpt_10.ckpt"
