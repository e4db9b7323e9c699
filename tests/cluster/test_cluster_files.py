"""The files in cluster/ are ones that Ray, the shell, AWS and Kubernetes would take.

No cloud is reached: Ray prepares each file as `ray up` does, and AWS is simulated. What only a real
cloud can show (images, quotas, drivers) is not tested here.
"""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
import time
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
RAY_UP = ["gpu.yaml", "gpu-gcp.yaml", "local.yaml"]
CLOUDS = ["gpu.yaml", "gpu-gcp.yaml"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def as_ray_up(name: str) -> dict[str, Any]:
    """Prepare and check a file as `ray up` does before it reaches for the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(copy.deepcopy(read(name)))
    validate_config(config)
    return config


def workers(config: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]
    }


def shell_lines(config: dict[str, Any]) -> list[str]:
    return [line for key, lines in config.items() if key.endswith("_commands") for line in lines]


def installs(name: str) -> list[Requirement]:
    """What a file has its nodes install."""
    if name == "kuberay.yaml":
        packages = runtime_env()["pip"]["packages"]
        return [Requirement(line) for line in packages]
    [line] = [c for c in read(name)["setup_commands"] if "pip install" in c]
    words = shlex.split(line)
    return [Requirement(word) for word in words[words.index("--python") + 2 :]]


def of_the_package(name: str) -> Requirement:
    [found] = [r for r in installs(name) if r.name == PROJECT["name"]]
    return found


def runtime_env() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(read("kuberay.yaml")["spec"]["runtimeEnvYAML"])
    return found


class TestRayUp:
    @pytest.mark.parametrize("name", RAY_UP)
    def test_ray_takes_the_file(self, name):
        assert as_ray_up(name)["cluster_name"] == "stiffness"

    @pytest.mark.parametrize("name", RAY_UP)
    def test_every_command_parses(self, name):
        lines = shell_lines(as_ray_up(name))

        assert len(lines) >= 8
        for line in lines:
            checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
            assert checked.returncode == 0, f"{line}\n{checked.stderr}"

    @pytest.mark.parametrize("name", RAY_UP)
    def test_setting_up_twice_leaves_one_trace(self, name, tmp_path):
        """`ray up` repeats the setup: the line for the shell's profile is written once."""
        line = read(name)["setup_commands"][-1]
        for _ in range(2):
            (tmp_path / ".bashrc").touch()
            subprocess.run(["bash", "-c", line], env={"HOME": str(tmp_path)}, check=True)

        assert (tmp_path / ".bashrc").read_text().splitlines() == [
            'export PATH="$HOME/stiffness/bin:$PATH"',
            "export RAY_AUTH_MODE=token",
        ]

    @pytest.mark.parametrize("name", RAY_UP)
    def test_files_that_are_copied_to_the_nodes_are_there(self, name):
        """Besides the token, which `ray get-auth-token --generate` makes."""
        mounts = dict(read(name)["file_mounts"])

        assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
        assert all((ROOT / path).is_file() for path in mounts.values())

    @pytest.mark.parametrize("name", CLOUDS)
    def test_the_head_offers_nothing_to_compute_on(self, name):
        config = as_ray_up(name)
        start = " ".join(config["head_start_ray_commands"])

        assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
        assert "--num-cpus=0 --num-gpus=0" in start

    @pytest.mark.parametrize("name", CLOUDS)
    def test_machines_come_from_nothing_and_go_when_idle(self, name):
        config = as_ray_up(name)

        assert config["idle_timeout_minutes"] <= 5
        assert config["provider"].get("cache_stopped_nodes", False) is False
        for node_type in workers(config).values():
            assert node_type["min_workers"] == 0
            # Either kind alone can fill the cluster, and both together do not exceed it.
            assert node_type["max_workers"] == config["max_workers"] > 0

    @pytest.mark.parametrize("name", CLOUDS)
    def test_spot_and_on_demand_are_the_same_machine(self, name):
        spot, on_demand = (
            as_ray_up(name)["available_node_types"][k] for k in ("gpu_spot", "gpu_on_demand")
        )
        terms = ("InstanceMarketOptions", "scheduling")

        assert spot["resources"] == on_demand["resources"] == {"CPU": 4, "GPU": 1}
        assert {k: v for k, v in spot["node_config"].items() if k not in terms} == {
            k: v for k, v in on_demand["node_config"].items() if k not in terms
        }

    def test_the_spot_machine_is_spot_and_the_other_is_not(self):
        aws, gcp = (workers(as_ray_up(name)) for name in CLOUDS)

        assert aws["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert "InstanceMarketOptions" not in aws["gpu_on_demand"]["node_config"]
        spot, on_demand = (
            gcp[k]["node_config"]["scheduling"] for k in ("gpu_spot", "gpu_on_demand")
        )
        assert spot["provisioningModel"] == "SPOT"
        assert "provisioningModel" not in on_demand
        # Google moves no machine with a GPU, and refuses one that asks for it.
        assert spot["onHostMaintenance"] == on_demand["onHostMaintenance"] == "TERMINATE"

    def test_own_machines_are_all_in_the_cluster(self):
        config = as_ray_up("local.yaml")
        [node_type] = config["available_node_types"].values()

        assert node_type["min_workers"] == len(config["provider"]["worker_ips"])


class TestRevision:
    """One revision, pinned, and one version of Ray everywhere."""

    @pytest.mark.parametrize("name", [*RAY_UP, "kuberay.yaml"])
    def test_the_package_is_installed_at_a_pinned_revision(self, name):
        package = of_the_package(name)

        assert re.fullmatch(
            r"https://github\.com/\S+/archive/REVISION\.(tar\.gz|zip)", package.url or ""
        )
        assert package.extras <= set(PROJECT["optional-dependencies"])

    @pytest.mark.parametrize("name", RAY_UP)
    def test_the_revision_stands_in_one_place(self, name):
        assert str(read(name)).count("REVISION") == 1

    def test_kubernetes_runs_the_script_of_the_revision_that_it_installs(self):
        assert runtime_env()["working_dir"] == of_the_package("kuberay.yaml").url

    def test_google_cloud_brings_what_gs_urls_need(self):
        assert of_the_package("gpu-gcp.yaml").extras == {"gcs"}

    def test_one_version_of_ray_which_the_package_takes(self):
        [ours] = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray"]
        versions = {
            specifier.version
            for name in RAY_UP
            for requirement in installs(name)
            if requirement.name == "ray"
            for specifier in requirement.specifier
        }
        cluster = read("kuberay.yaml")["spec"]["rayClusterSpec"]
        versions.add(cluster["rayVersion"])
        versions |= {container["image"].split(":")[1].split("-")[0] for container in containers()}
        versions |= set(re.findall(r"ray\[default\]==([\d.]+)", (FOLDER / "README.md").read_text()))

        [version] = versions
        assert version in ours.specifier


class TestSecurity:
    @pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.name)
    def test_nothing_is_open_to_the_world(self, path):
        text = path.read_text()

        for everywhere in ("0.0.0.0", "::/0", "LoadBalancer", "NodePort", "ingress:"):
            assert everywhere not in text

    @pytest.mark.parametrize("name", RAY_UP)
    def test_the_dashboard_stays_on_loopback(self, name):
        config = as_ray_up(name)
        [head] = [c for c in config["head_start_ray_commands"] if "ray start" in c]
        [worker] = [c for c in config["worker_start_ray_commands"] if "ray start" in c]

        assert "--dashboard-host=127.0.0.1" in head
        assert "dashboard" not in worker

    def test_no_rule_is_added_to_the_security_group(self):
        assert read("gpu.yaml")["provider"]["security_group"] == {"GroupName": "stiffness"}

    def test_pods_ask_for_the_token(self):
        assert read("kuberay.yaml")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


class Refuses:
    """An EC2 that has no spot machine left."""

    def __init__(self, ec2: Any) -> None:
        self._ec2 = ec2

    def create_instances(self, **options: Any) -> Any:
        if options.get("InstanceMarketOptions") == {"MarketType": "spot"}:
            error = {"Code": "InsufficientInstanceCapacity", "Message": "no spot"}
            raise ClientError({"Error": error}, "RunInstances")
        return self._ec2.create_instances(**options)


class TestSpotFirst:
    """Ray's own scheduler chooses, with the types of the file and the rule of spot_first.py."""

    @pytest.fixture
    def choose(self, monkeypatch):
        """Say what is started for jobs that ask, after launches that ended as given."""
        from ray.autoscaler._private.node_provider_availability_tracker import (
            NodeProviderAvailabilityTracker,
        )
        from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
        from ray.autoscaler.node_launch_exception import NodeLaunchException

        def started(name: str, demands, *, refused=(), seconds_ago=0.0, spot_coming=0):
            config = as_ray_up(name)
            [start] = [c for c in config["head_start_ray_commands"] if "ray start" in c]
            rule = re.search(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+);", start)
            assert rule
            monkeypatch.syspath_prepend(FOLDER)
            monkeypatch.setenv("RAY_AUTOSCALER_UTILIZATION_SCORER", rule[1])
            tracker = NodeProviderAvailabilityTracker()
            for node_type in refused:
                tracker.update_node_availability(
                    node_type, time.time() - seconds_ago, NodeLaunchException("X", "none", None)
                )
            scheduler = ResourceDemandScheduler(
                None, config["available_node_types"], config["max_workers"], "head", 1.0
            )
            coming = {"head": 1, "gpu_spot": spot_coming}
            found, _ = scheduler.get_nodes_to_launch(
                [], coming, demands, {}, [], {}, [], tracker.summary()
            )
            return dict(found)

        return started

    replica = {"CPU": 1, "GPU": 1}  # noqa: RUF012  # what engine/resources.py asks for

    @pytest.mark.parametrize("name", CLOUDS)
    def test_spot_is_tried_first(self, choose, name):
        assert choose(name, [self.replica] * 3) == {"gpu_spot": 3}

    @pytest.mark.parametrize("name", CLOUDS)
    def test_on_demand_where_spot_was_refused(self, choose, name):
        found = choose(name, [self.replica], refused=["gpu_spot"])

        assert found == {"gpu_on_demand": 1}

    @pytest.mark.parametrize("name", CLOUDS)
    def test_spot_is_tried_again_after_half_an_hour(self, choose, name):
        found = choose(name, [self.replica], refused=["gpu_spot"], seconds_ago=31 * 60)

        assert found == {"gpu_spot": 1}

    @pytest.mark.parametrize("name", CLOUDS)
    def test_spot_where_all_was_refused(self, choose, name):
        found = choose(name, [self.replica], refused=["gpu_spot", "gpu_on_demand"])

        assert found == {"gpu_spot": 1}

    @pytest.mark.parametrize("name", CLOUDS)
    def test_both_kinds_together_stay_within_the_maximum(self, choose, name):
        found = choose(name, [self.replica] * 9, refused=["gpu_spot"], spot_coming=3)

        assert found == {"gpu_on_demand": 1}

    @pytest.mark.parametrize("name", CLOUDS)
    def test_a_job_that_waits_for_any_node_gets_a_worker(self, choose, name):
        """One CPU, which the engine asks for where no device is named: the head has none."""
        assert choose(name, [{"CPU": 1}]) == {"gpu_spot": 1}

    @pytest.mark.parametrize("name", CLOUDS)
    def test_nothing_for_what_no_machine_holds(self, choose, name):
        assert choose(name, [{"GPU": 2}]) == {}

    @pytest.mark.parametrize("name", CLOUDS)
    def test_the_head_runs_the_autoscaler_that_knows_the_rule(self, name):
        """Also where `ray up` asks for the second version, as it does since Ray 2.50."""
        from ray.autoscaler._private.util import with_envs

        [start] = [c for c in read(name)["head_start_ray_commands"] if "ray start" in c]
        [line] = with_envs([start], {"RAY_enable_autoscaler_v2": "1"})
        told = line.replace(line[line.index("ray start") :], "echo $RAY_enable_autoscaler_v2")
        ran = subprocess.run(["bash", "-c", told], capture_output=True, text=True)

        assert ran.stdout.strip() == "0"


class TestAws:
    """`aws cloudformation deploy` and `ray up`, in a simulated account."""

    @pytest.fixture
    def account(self, monkeypatch, tmp_path):
        """An account in which the template was deployed."""
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("HOME", str(tmp_path))  # `ray up` makes a key in ~/.ssh
        region = read("gpu.yaml")["provider"]["region"]
        monkeypatch.setenv("AWS_DEFAULT_REGION", region)
        values = {"Bucket": "results-of-a-test", "SshFrom": "203.0.113.7/32"}
        with mock_aws():
            boto3.client("cloudformation").create_stack(
                StackName="stiffness",
                TemplateBody=(FOLDER / "aws-account.yaml").read_text(),
                Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in values.items()],
                Capabilities=["CAPABILITY_NAMED_IAM"],
            )
            yield

    @staticmethod
    def provider_and_config() -> tuple[Any, dict[str, Any]]:
        """What `ray up` has after it has looked at the account."""
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        config = AWSNodeProvider.bootstrap_config(
            AWSNodeProvider.fillout_available_node_types_resources(as_ray_up("gpu.yaml"))
        )
        return AWSNodeProvider(config["provider"], config["cluster_name"]), config

    def launch(self, node_type: str, *, without_spot: bool = False) -> Any:
        """Start a machine as the autoscaler does; return its record of what there is."""
        from ray.autoscaler._private.event_summarizer import EventSummarizer
        from ray.autoscaler._private.node_launcher import BaseNodeLauncher
        from ray.autoscaler._private.node_provider_availability_tracker import (
            NodeProviderAvailabilityTracker,
        )

        provider, config = self.provider_and_config()
        if without_spot:
            provider.ec2_fail_fast = Refuses(provider.ec2_fail_fast)
        tracker = NodeProviderAvailabilityTracker()
        BaseNodeLauncher(
            provider=provider,
            pending=PendingLaunches(),
            event_summarizer=EventSummarizer(),
            node_provider_availability_tracker=tracker,
            session_name="session",
            node_types=config["available_node_types"],
        ).launch_node(config, 1, node_type)
        return tracker.summary()

    @pytest.mark.usefixtures("account")
    def test_ssh_from_one_place_and_nothing_else(self):
        """Ray finds the group by its name and leaves its rules as they are."""
        _, config = self.provider_and_config()
        [group] = boto3.client("ec2").describe_security_groups(GroupNames=["stiffness"])[
            "SecurityGroups"
        ]

        from_outside = [
            (rule["FromPort"], rule["ToPort"], rule["IpRanges"])
            for rule in group["IpPermissions"]
            if rule["IpRanges"] or rule["Ipv6Ranges"]
        ]
        assert from_outside == [(22, 22, [{"CidrIp": "203.0.113.7/32"}])]
        for node_type in config["available_node_types"].values():
            assert node_type["node_config"]["SecurityGroupIds"] == [group["GroupId"]]

    @pytest.mark.usefixtures("account")
    def test_ray_makes_no_role_of_its_own(self):
        """It would make one that may do all with EC2 and with every bucket."""
        self.provider_and_config()
        profiles = boto3.client("iam").list_instance_profiles()["InstanceProfiles"]

        assert {p["InstanceProfileName"] for p in profiles} == {
            node_type["node_config"]["IamInstanceProfile"]["Name"]
            for node_type in as_ray_up("gpu.yaml")["available_node_types"].values()
        }

    @pytest.mark.usefixtures("account")
    def test_workers_may_use_the_bucket_and_nothing_else(self):
        iam = boto3.client("iam")
        [attached] = iam.list_attached_role_policies(RoleName="stiffness-worker")[
            "AttachedPolicies"
        ]
        version = iam.get_policy_version(PolicyArn=attached["PolicyArn"], VersionId="v1")
        statements = version["PolicyVersion"]["Document"]["Statement"]

        assert iam.list_role_policies(RoleName="stiffness-worker")["PolicyNames"] == []
        assert {s["Resource"] for s in statements} == {
            "arn:aws:s3:::results-of-a-test",
            "arn:aws:s3:::results-of-a-test/*",
        }

    @pytest.mark.usefixtures("account")
    def test_the_bucket_is_private_and_outlives_the_stack(self):
        boto3.client("s3").head_bucket(Bucket="results-of-a-test")
        bucket = read("aws-account.yaml")["Resources"]["Results"]

        # The simulation does not know these two.
        assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
        assert bucket["DeletionPolicy"] == bucket["UpdateReplacePolicy"] == "Retain"

    @pytest.mark.parametrize(
        ("node_type", "lifecycle"), [("gpu_spot", "spot"), ("gpu_on_demand", None)]
    )
    @pytest.mark.usefixtures("account")
    def test_a_worker_is_started_with_its_role(self, node_type, lifecycle):
        record = self.launch(node_type)
        [reservation] = boto3.client("ec2").describe_instances()["Reservations"]
        [instance] = reservation["Instances"]

        assert record.node_availabilities[node_type].is_available
        assert instance.get("InstanceLifecycle") == lifecycle
        assert instance["IamInstanceProfile"]["Arn"].endswith("/stiffness-worker")

    @pytest.mark.usefixtures("account")
    def test_a_refusal_of_spot_is_what_the_rule_looks_at(self):
        """With this record, TestSpotFirst says, the next machine is on demand."""
        record = self.launch("gpu_spot", without_spot=True).node_availabilities["gpu_spot"]

        assert not record.is_available
        assert record.unavailable_node_information.category == "InsufficientInstanceCapacity"


class PendingLaunches:
    """The launcher's count of what is under way."""

    def dec(self, node_type: str, count: int) -> None:
        pass


def containers() -> list[dict[str, Any]]:
    """Every container of the Kubernetes job, each group's alone."""
    cluster = read("kuberay.yaml")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    found = []
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        found.append(container)
    return found


class TestKubeRay:
    def test_it_is_a_job_that_takes_its_cluster_down(self):
        job = read("kuberay.yaml")

        assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
        assert job["metadata"]["generateName"]
        assert job["spec"]["shutdownAfterJobFinishes"] is True
        assert job["spec"]["activeDeadlineSeconds"] > 0

    def test_what_the_definition_of_the_resource_requires_is_there(self):
        """The fields that KubeRay's definition marks as required, in the types that it wants."""
        cluster = read("kuberay.yaml")["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert all(isinstance(v, str) for v in group["rayStartParams"].values())
            assert group["template"]["spec"]["containers"]
        for group in cluster["workerGroupSpecs"]:
            assert group["groupName"]
            assert isinstance(group["minReplicas"], int)
            assert isinstance(group["maxReplicas"], int)

    def test_no_field_is_one_that_kuberay_does_not_know(self):
        """KubeRay drops a misspelt field without a word. Names from its reference, release 1.6."""
        job = read("kuberay.yaml")["spec"]
        cluster = job["rayClusterSpec"]

        assert set(job) <= {
            "entrypoint",
            "runtimeEnvYAML",
            "shutdownAfterJobFinishes",
            "ttlSecondsAfterFinished",
            "activeDeadlineSeconds",
            "backoffLimit",
            "rayClusterSpec",
        }
        assert set(cluster) <= {
            "rayVersion",
            "authOptions",
            "enableInTreeAutoscaling",
            "autoscalerOptions",
            "headGroupSpec",
            "workerGroupSpecs",
        }
        group = {"rayStartParams", "template"}
        assert set(cluster["headGroupSpec"]) <= group | {"serviceType"}
        for workers_ in cluster["workerGroupSpecs"]:
            assert set(workers_) <= group | {"groupName", "replicas", "minReplicas", "maxReplicas"}

    def test_the_head_offers_nothing_to_compute_on(self):
        head = read("kuberay.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]

        assert head["rayStartParams"] == {"num-cpus": "0"}
        assert head["serviceType"] == "ClusterIP"
        assert "nvidia.com/gpu" not in containers()[0]["resources"]["limits"]

    def test_workers_come_from_nothing_and_go_when_idle(self):
        cluster = read("kuberay.yaml")["spec"]["rayClusterSpec"]
        [group] = cluster["workerGroupSpecs"]

        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 300
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        assert containers()[1]["resources"]["limits"]["nvidia.com/gpu"] == 1

    def test_ray_takes_the_runtime_environment(self):
        from ray.runtime_env import RuntimeEnv

        environment = RuntimeEnv(**runtime_env())

        assert environment["config"]["setup_timeout_seconds"] >= 1800

    def test_the_entry_point_is_a_script_of_the_project_with_its_options(self):
        python, script, *options = shlex.split(read("kuberay.yaml")["spec"]["entrypoint"])

        assert python == "python"
        assert (ROOT / script).is_file()
        assert {word for word in options if word.startswith("--")} <= options_of(ROOT / script)

    def test_a_job_asks_for_no_more_machines_than_may_come(self):
        words = shlex.split(read("kuberay.yaml")["spec"]["entrypoint"])
        [group] = read("kuberay.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]

        assert int(words[words.index("--max-replicas") + 1]) == group["maxReplicas"]


@cache
def options_of(script: Path) -> frozenset[str]:
    """The options that a job script says it has."""
    ran = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )
    return frozenset(re.findall(r"--[a-z][a-z-]*", ran.stdout))


def blocks(language: str) -> list[str]:
    text = (FOLDER / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Each call of a program in the README's shell blocks, as words."""
    found = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s", line.partition("  #")[0]):
                words = shlex.split(part, comments=True)
                if words[:1] == [program]:
                    found.append(words[1:])
    return found


class TestReadme:
    def test_every_file_is_named_and_every_named_file_is_there(self):
        text = (FOLDER / "README.md").read_text()
        named = set(re.findall(r"(?:cluster/|`)([\w-]+\.(?:yaml|py))\b", text))

        assert {p.name for p in FOLDER.iterdir() if p.suffix in (".yaml", ".py")} <= named
        jobs = {path.name for path in (ROOT / "jobs").iterdir()}
        assert named <= {p.name for p in FOLDER.iterdir()} | jobs

    def test_shell_and_python_parse(self):
        for block in blocks("bash"):
            subprocess.run(["bash", "-n", "-c", block], check=True)
        for block in blocks("python"):
            compile(block, "README.md", "exec")

    def test_from_nothing_to_results_in_five_commands(self):
        [block] = [b for b in blocks("bash") if "cloudformation deploy" in b]

        assert re.findall(r"^# (\d)\.", block, flags=re.MULTILINE) == list("12345")

    def test_rays_commands_and_options_are_there(self):
        from ray.scripts.scripts import cli

        calls = commands("ray")
        assert len(calls) > 10
        for words in calls:
            command: Any = cli
            while hasattr(command, "commands"):
                command = command.commands[words[0]]
                words = words[1:]
            known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
            ours = words[: words.index("--")] if "--" in words else words
            assert {w.partition("=")[0] for w in ours if w.startswith("-")} <= known, words

    def test_jobs_and_their_options_are_there(self):
        submitted = [words[words.index("--") + 1 :] for words in commands("ray") if "--" in words]

        assert len(submitted) >= 3
        for python, script, *options in submitted:
            assert python == "python"
            path = ROOT / "jobs" / script  # --working-dir jobs
            assert {word for word in options if word.startswith("--")} <= options_of(path)

    def test_the_template_is_given_what_it_asks_for(self):
        [deploy] = [w for w in commands("aws") if w[:2] == ["cloudformation", "deploy"]]
        given = {word.partition("=")[0] for word in deploy[deploy.index("--parameter-overrides") :]}

        assert set(read("aws-account.yaml")["Parameters"]) <= given
