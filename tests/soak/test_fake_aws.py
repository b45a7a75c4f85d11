"""`ray up clusters/aws.ray-up.yaml` against a fake AWS (moto), as far as machines that run; nobody logs into them."""

from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).parents[2] / "clusters" / "aws.ray-up.yaml"

pytestmark = pytest.mark.soak


@pytest.fixture
def ec2(monkeypatch, tmp_path):
    """A client of an empty AWS, to which every other client here goes, too."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in {
        "HOME": tmp_path,  # a key is written to ~/.ssh
        "AWS_ACCESS_KEY_ID": "fake",
        "AWS_SECRET_ACCESS_KEY": "fake",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
    }.items():
        monkeypatch.setenv(name, str(value))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    yield boto3.client("ec2", region_name="us-east-1")
    server.stop()


def test_the_head_is_on_demand_the_workers_are_spot_and_all_are_in_the_group_of_the_user(ec2):
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    text = FILE.read_text()
    image = ec2.describe_images()["Images"][0]["ImageId"]
    group = ec2.create_security_group(GroupName="unifork", Description="unifork")["GroupId"]
    filled = {"REGION": "us-east-1", "ZONE": "us-east-1a", "AMI": image, "[SECURITY_GROUP]": f"[{group}]"}
    for word, value in filled.items():
        assert word in text
        text = text.replace(word, value)
    config = _bootstrap_config(yaml.safe_load(text), no_config_cache=True)

    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert {name: types["gpu"]["resources"][name] for name in ("CPU", "GPU")} == {"CPU": 192, "GPU": 8}
    assert types["gpu"]["resources"]["accelerator_type:H100"] == 1

    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name in ("head", "gpu", "gpu"):  # moto makes a single spot machine of a request for several
        tags = {"ray-node-type": "worker" if name == "gpu" else "head", "ray-user-node-type": name}
        provider.create_node(types[name]["node_config"], tags, 1)
    machines = [each for batch in ec2.describe_instances()["Reservations"] for each in batch["Instances"]]
    kinds = sorted((each["InstanceType"], each.get("InstanceLifecycle", "on demand")) for each in machines)
    assert kinds == [("m7i.2xlarge", "on demand"), ("p5.48xlarge", "spot"), ("p5.48xlarge", "spot")]
    assert {each["ImageId"] for each in machines} == {image}
    assert [found["GroupId"] for each in machines for found in each["SecurityGroups"]] == [group] * 3
    assert {each["Placement"]["AvailabilityZone"] for each in machines} == {"us-east-1a"}
    provider.terminate_nodes([each["InstanceId"] for each in machines])
    states = [each for batch in ec2.describe_instances()["Reservations"] for each in batch["Instances"]]
    assert {each["State"]["Name"] for each in states} == {"terminated"}
