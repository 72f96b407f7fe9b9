"""Configuration of `dynamollm-gateway`: `/etc/dynamollm/gateway.toml` < `DYNAMOLLM_GATEWAY__…` < flag."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from common.config import ConfigModel
from common.tls import ClientTls, check_pem
from common.tls_server import stays_here
from controller.domain.slo import Slo
from controller.policy.routing import Weights

DEFAULT_PATH = Path("/etc/dynamollm/gateway.toml")
PART = "gateway"

Seconds = Annotated[float, Field(gt=0, le=86_400)]
TermWeight = Annotated[float, Field(ge=0, le=1000)]
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000)]


def split_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` as host and port; ValueError with a reason otherwise."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


class LimitsConfig(ConfigModel):
    """What the gateway takes on, and how long it waits."""

    body_bytes: int = Field(default=8 * 1024 * 1024, ge=1024, description="Largest request body; larger ones get 413.")
    body_s: Seconds = Field(default=30.0, description="Time a client has to send its request.")
    waiting: int = Field(default=10_000, ge=1, description="Requests that may wait; further ones get 429.")
    queue_s: Seconds = Field(default=60.0, description="Longest wait for an instance; then the request gets 503.")
    attempts: int = Field(
        default=3, ge=1, le=10, description="Instances tried for a request while nothing has reached its client."
    )
    connect_s: Seconds = Field(default=2.0, description="Time to reach an engine.")
    silent_s: Seconds = Field(
        default=120.0, description="An answer of which nothing moved for this long is given up: engine or client hangs."
    )
    answer_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1024, description="Largest answer that is not streamed (those are held whole)."
    )
    drain_s: Seconds = Field(default=60.0, description="On stop, time for running requests to finish.")


class ClassifyConfig(ConfigModel):
    """How prompts are counted and output lengths are guessed."""

    output_quantile: float = Field(
        default=0.8,
        gt=0,
        lt=1,
        description="Route for an output at least as long as this share of the earlier requests like it had. Higher "
        "errs towards pools that can carry more.",
    )
    min_confidence: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="A prediction whose likeliest output bucket is less probable than this is not used: the request "
        "goes to the pool for the longest output it may have.",
    )
    predictor: Literal["conditional", "input"] = Field(
        default="conditional",
        description="What output lengths are predicted from: earlier requests of the same input bucket, model, route, "
        "limits and tenant, or of the same input bucket only.",
    )
    text_model: str = Field(
        default="",
        description="File of `dynamollm predictor train`, which also reads the prompt. Used for as long as it "
        "predicts better than the above does. Empty: none.",
    )
    tokenizers: dict[str, Path] = Field(
        default={},
        description="The tokenizer.json of each model, by its name, for counting input tokens. Needs the extra "
        "`tokenizers`. Models without one are counted by bytes, with a ratio learnt from the engines.",
    )


class RoutingConfig(ConfigModel):
    """What a choice among a pool's instances is made by, and which choices are explained in the history."""

    load: TermWeight = Field(default=1.0, description="Weight of requests in flight and unread prompts, per capacity.")
    energy: TermWeight = Field(
        default=0.0, description="Weight of the joules that one request more costs there under the profile."
    )
    kv_use: TermWeight = Field(default=0.0, description="Weight of the share of the KV cache in use.")
    prefix: TermWeight = Field(
        default=0.0,
        description="Weight of not having just read a prompt with the same beginning (the engines' prefix caches).",
    )
    fill: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Up to this share of its limit an instance may be preferred for energy, KV use or prefix.",
    )
    sample_one_in: int = Field(
        default=1000,
        ge=0,
        description="One of so many choices is reported to the controller with every alternative and why it lost. 0: "
        "none.",
    )
    samples_per_minute: int = Field(default=10, ge=1, le=1000, description="The most that are reported.")

    @model_validator(mode="after")
    def _some(self) -> RoutingConfig:
        if not self.load + self.energy + self.kv_use + self.prefix:
            raise ValueError("one of the weights must be above zero")
        return self

    def weights(self) -> Weights:
        return Weights(self.load, self.energy, self.kv_use, self.prefix, self.fill)


class AccessConfig(ConfigModel):
    """Who may send requests."""

    keys_file: str = Field(
        default="",
        description="File of API keys, a line `NAME SHA256` each (dynamollm-gateway new-key NAME). The key is not "
        "passed on to engines then. Empty: anybody may send, and what they authorise with is passed on.",
    )
    tenant_header: str = Field(
        default="",
        description="Without keys: request header that names the tenant, set by a proxy that you trust. Only used "
        "to predict output lengths.",
    )


class TlsConfig(ConfigModel):
    """HTTPS for the API. Both empty: plain HTTP."""

    certificate: str = Field(default="", description="PEM file of the certificate and its chain.")
    key: str = Field(default="", description="PEM file of its private key.")

    @model_validator(mode="after")
    def _both(self) -> TlsConfig:
        if bool(self.certificate) != bool(self.key):
            raise ValueError("certificate and key belong together")
        return self


class PickerTls(ConfigModel):
    """Mutual TLS for the picker's port: certificates of `client_ca` whose names stand in `scopes`. All or none."""

    cert: str = Field(default="", description="Own certificate, PEM; a renewed one is taken up without a restart.")
    key: str = Field(default="", description="Its private key, PEM.")
    client_ca: str = Field(default="", description="Authority that signs the certificates of Envoys and tools, PEM.")
    scopes: dict[str, Literal["envoy", "tool"]] = Field(
        default={},
        description="Scope by the name (CN) or alternative name (URI, DNS) of a client certificate: `envoy` may call "
        "what Envoys do, `tool` may call Route and ReportCompletion. Names not listed may do nothing.",
    )

    @property
    def on(self) -> bool:
        return bool(self.cert)

    def check(self) -> None:
        """Raises UserError for files that nobody could be served with."""
        if self.on:
            where = "picker.tls"
            check_pem({f"{where}.client_ca": self.client_ca}, {f"{where}.cert": self.cert}, {f"{where}.key": self.key})

    @model_validator(mode="after")
    def _whole(self) -> PickerTls:
        if len({bool(value) for value in (self.cert, self.key, self.client_ca)}) > 1:
            raise ValueError("cert, key and client_ca belong together; set all of them or none")
        if self.on != bool(self.scopes):
            raise ValueError('scopes say who may call over tls: set both or none, such as scopes = {"NAME" = "envoy"}')
        return self


class PickerConfig(ConfigModel):
    """The endpoint picker for Envoy (docs/envoy.md) and the Gateway service for orchestration tools, both over gRPC."""

    listen: str = Field(
        default="",
        description="HOST:PORT of the gRPC services, port 0: any. Without tls loopback only. Empty: off.",
    )
    tls: PickerTls = PickerTls()
    overcommit: float = Field(
        default=1.5,
        ge=1,
        le=10,
        description="There is no queue in front of Envoy: with all instances full, requests are sent on up to this "
        "multiple of their limits, to wait inside an engine. Beyond it they get 429. 1: none are.",
    )
    engine_priority: bool = Field(
        default=False,
        description="Engines run with --scheduling-policy priority: while deadlines are at risk, requests carry the "
        "instant that their first token is due as their priority. Others refuse such requests.",
    )
    alternatives: int = Field(
        default=2, ge=0, le=5, description="Further instances named to Envoy, for its retries before the first byte."
    )
    shown_at_once: int = Field(
        default=50,
        ge=1,
        description="Of the answers that Envoy is configured to show, the most that are watched at a time: ten of "
        "their tokens cost as much as a choice. Those that are watched speak for the others.",
    )
    forget_s: Seconds = Field(
        default=60.0,
        description="A request of which nothing was heard for this long has ended unseen (Envoy reports running ones "
        "every access_log_flush_interval: keep that below a third of this).",
    )


class SloConfig(ConfigModel):
    """Bounds of the service level objectives, for what is reported as within them and for the order of the queue.
    Should be those that the controller's profile was measured for."""

    ttft_s_ms: Milliseconds = Slo().ttft_s_ms
    ttft_m_ms: Milliseconds = Slo().ttft_m_ms
    ttft_l_ms: Milliseconds = Slo().ttft_l_ms
    tbt_ms: Milliseconds = Slo().tbt_ms

    def slo(self) -> Slo:
        return Slo(self.ttft_s_ms, self.ttft_m_ms, self.ttft_l_ms, self.tbt_ms)


class LogConfig(ConfigModel):
    """Logs go to stderr. Prompts and answers never do."""

    form: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class GatewayConfig(ConfigModel):
    """Everything the gateway needs to know."""

    gateway_id: str = Field(default="", max_length=100, description="Name in load reports. Empty: the host's name.")
    listen: str = Field(default="127.0.0.1:8800", description="HOST:PORT of the OpenAI-compatible API; port 0: any.")
    controller: str = Field(default="127.0.0.1:7700", description="gRPC address of the controller.")
    controller_tls_name: str = Field(
        default="", description="Name in the controller's certificate. Empty: the host of its address."
    )
    report_interval_s: Seconds = Field(default=1.0, description="How often the load is reported to the controller.")
    state_dir: str = Field(
        default="",
        description="Folder for the last routing table, which a gateway that starts without its controller serves by. "
        "Empty: none is kept.",
    )
    limits: LimitsConfig = LimitsConfig()
    classify: ClassifyConfig = ClassifyConfig()
    routing: RoutingConfig = RoutingConfig()
    slo: SloConfig = SloConfig()
    access: AccessConfig = AccessConfig()
    tls: TlsConfig = TlsConfig()
    controller_tls: ClientTls = Field(
        default=ClientTls(),
        description="Mutual TLS to the controller; it lets this certificate's name in by its scopes.",
    )
    picker: PickerConfig = PickerConfig()
    log: LogConfig = LogConfig()

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("picker")
    @classmethod
    def _picker(cls, value: PickerConfig) -> PickerConfig:
        if value.listen:
            split_address(value.listen)
            if not value.tls.on and not stays_here(value.listen):
                raise ValueError(f"{value.listen} can be reached from elsewhere: set tls, or listen on loopback")
        return value

    @field_validator("controller")
    @classmethod
    def _controller(cls, value: str) -> str:
        if not value.startswith("unix:") and split_address(value)[1] == 0:
            raise ValueError("port 0 cannot be connected to")
        return value

    @property
    def name(self) -> str:
        return self.gateway_id or socket.gethostname()
