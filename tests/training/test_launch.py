"""What training asks Ray for."""

from pathlib import Path


def test_training_asks_for_the_gpus_of_the_cluster_file(ray_session, tmp_path):
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from unifork.config import TrainResources
    from unifork.training.launch import scaling

    def worker(config):
        import os

        rank = ray.train.get_context().get_world_rank()
        Path(config["folder"], str(rank)).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    resources = TrainResources(workers=2, cpus=0.5, gpus=1)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=scaling(resources),
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray"), name="gpus"),
    )
    trainer.fit()
    seen = {(tmp_path / rank).read_text() for rank in ("0", "1")}
    assert all(devices for devices in seen)
