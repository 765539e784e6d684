"""The arguments of an application, and the deployments that they make."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from kunserve.command.arguments import parse_args
from kunserve.errors import ConfigError
from kunserve.ray.ingress import Ingress
from kunserve.ray.replica import Replica
from kunserve.ray.router import PrefixRouter
from kunserve.ray.scaling import by_demand

MOST_ONGOING = 4096  # of a replica: its server has a queue of its own, and refuses what is too much for it
STATS_PERIOD_S = 1.0
# Fronts and replicas only wait for sockets. With a thread of its own for what Serve does, a token cost a front half as
# much again, and a request 7 ms.
ONE_LOOP = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}

AtLeastOne = Annotated[int, Meta(ge=1)]


class Model(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One model: its server's flags, and what its replicas get."""

    model: str
    flags: str = ""  # of `kunserve serve`, as on a command line
    replicas: AtLeastOne = 1
    max_replicas: AtLeastOne | None = None  # more than `replicas`: between them, as demand asks for
    num_gpus: Annotated[float, Meta(ge=0)] = 0  # of one replica
    num_cpus: Annotated[float, Meta(ge=0)] = 1
    upscale_delay_s: Annotated[float, Meta(ge=0)] = 10.0  # that demand must last before another replica starts
    downscale_delay_s: Annotated[float, Meta(ge=0)] = 600.0  # that it must lack before one goes
    drain_s: Annotated[float, Meta(ge=0)] = 120.0  # for requests of a replica that goes; then they go on elsewhere

    @property
    def arguments(self) -> list[str]:
        """Return the command line of a server."""
        return [self.model, *shlex.split(self.flags)]


class Arguments(Model, kw_only=True, forbid_unknown_fields=True):
    """Arguments of the application: one model, or several under `models`."""

    model: str = ""
    models: list[Model] = []
    fronts: AtLeastOne = 1


def read_arguments(given: Mapping[str, Any]) -> tuple[list[Model], int]:
    """Return the models, and how many fronts there are. Raises ConfigError for arguments that cannot be."""
    try:
        asked = msgspec.convert(given, Arguments, strict=False)  # on a command line all are strings
    except msgspec.ValidationError as error:
        raise ConfigError(f"kunserve.ray: {error}") from None
    if bool(asked.model) == bool(asked.models):
        raise ConfigError("kunserve.ray: give one `model`, or several as `models`")
    own = {name: getattr(asked, name) for name in Model.__struct_fields__}
    models = asked.models or [Model(**own)]
    for model in models:
        if model.max_replicas is not None and model.max_replicas < model.replicas:
            raise ConfigError(f"kunserve.ray: max_replicas of {model.model} must be at least replicas")
    return models, asked.fronts


def build(args: Mapping[str, Any]) -> Application:
    """Return the application that `args` describe. Raises ConfigError."""
    models, num_fronts = read_arguments(args)
    key, handles = secrets.token_hex(16), dict[str, Any]()
    for number, model in enumerate(models):
        bound = _deployment(model, number).bind(model.arguments, key)
        for name in parse_args(model.arguments, "kunserve.ray").served_names:  # wrong flags are told here, not by Ray
            if name in handles:
                raise ConfigError(f"kunserve.ray: two models are called {name}: give them --served-model-name")
            handles[name] = bound
    ingress = serve.ingress()(Ingress)
    front = serve.deployment(
        ingress,
        name="front",
        num_replicas=num_fronts,
        max_ongoing_requests=MOST_ONGOING,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": ONE_LOOP}},
    )
    return front.bind(handles, key)


def _deployment(model: Model, number: int) -> Any:
    name = re.sub(r"[^\w.-]+", "-", model.model.strip("/").rpartition("/")[2])
    scaling: dict[str, Any] = {"num_replicas": model.replicas}
    if model.max_replicas is not None and model.max_replicas > model.replicas:
        scaling = {"autoscaling_config": _autoscaling(model.replicas, model.max_replicas, model)}
    return serve.deployment(
        Replica,
        name=f"{name}-{number}",
        max_ongoing_requests=MOST_ONGOING,
        graceful_shutdown_timeout_s=model.drain_s,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        ray_actor_options={
            "num_cpus": model.num_cpus,
            "num_gpus": model.num_gpus,
            "runtime_env": {"env_vars": ONE_LOOP},
        },
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_routing_stats_period_s=STATS_PERIOD_S
        ),
        **scaling,
    )


def _autoscaling(least: int, most: int, model: Model) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        upscale_delay_s=model.upscale_delay_s,
        downscale_delay_s=model.downscale_delay_s,
        metrics_interval_s=STATS_PERIOD_S,
        look_back_period_s=5 * STATS_PERIOD_S,
        policy=AutoscalingPolicy(policy_function=by_demand),
    )
