"""A thousand agents in one process, for measuring the controller: `python -m tests.many_agents FOLDER COUNT`.

Each has a server and a unix socket of its own, FOLDER/N, so that each is a connection of its own. It streams a sample
of eight GPUs and four instances a second and says yes to every call. Prints `ready` and ends with its input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from itertools import cycle
from typing import Any

import grpc

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types
from tests.synthetic_profile import MODEL

GPUS, PER_NODE, SAMPLES = 8, 4, 8


def pool_of(slot: int) -> str:
    return "short" if slot < 3 else "long"


class Agent(rpc.NodeAgentServicer):
    def __init__(self, number: int) -> None:
        self._number = number
        self._uuids = [f"GPU-{number}-{i}" for i in range(GPUS)]
        self._instances = [
            types.Instance(
                spec=types.InstanceSpec(
                    instance_id=f"i-{number}-{slot}",
                    model=MODEL,
                    gpu_uuids=self._uuids[2 * slot : 2 * slot + 2],
                    labels={"pool": pool_of(slot)},
                ),
                state=types.INSTANCE_STATE_READY,
                endpoint=f"http://{number}-{slot}",
            )
            for slot in range(PER_NODE)
        ]

        self._samples = [self._sample(second) for second in range(1, SAMPLES + 1)]

    async def GetNode(self, request: pb.GetNodeRequest, context: Any) -> pb.GetNodeResponse:
        gpus = [pb.Gpu(uuid=uuid, index=i) for i, uuid in enumerate(self._uuids)]
        return pb.GetNodeResponse(node_id=f"n{self._number}", gpus=gpus)

    async def ListInstances(self, request: pb.ListInstancesRequest, context: Any) -> pb.ListInstancesResponse:
        return pb.ListInstancesResponse(instances=self._instances)

    async def WatchInstances(
        self, request: pb.WatchInstancesRequest, context: Any
    ) -> AsyncIterator[pb.WatchInstancesResponse]:
        yield pb.WatchInstancesResponse(instances=self._instances)
        await asyncio.sleep(3600)

    async def WatchTelemetry(
        self, request: pb.WatchTelemetryRequest, context: Any
    ) -> AsyncIterator[pb.WatchTelemetryResponse]:
        await asyncio.sleep(self._number % 100 / 100 * request.interval_s)
        for sample in cycle(self._samples):  # made before: what is to be measured is who reads them
            yield sample
            await asyncio.sleep(request.interval_s)

    async def ApplyControls(self, request: pb.ApplyControlsRequest, context: Any) -> pb.ApplyControlsResponse:
        results = [pb.ControlResult(gpu_uuid=c.gpu_uuid, code=pb.CONTROL_CODE_APPLIED) for c in request.controls]
        return pb.ApplyControlsResponse(results=results)

    async def ReleaseControls(self, request: pb.ReleaseControlsRequest, context: Any) -> pb.ReleaseControlsResponse:
        results = [pb.ControlResult(gpu_uuid=uuid, code=pb.CONTROL_CODE_APPLIED) for uuid in request.gpu_uuids]
        return pb.ReleaseControlsResponse(results=results)

    def _sample(self, second: int) -> pb.WatchTelemetryResponse:
        gpus = [
            pb.GpuSample(
                uuid=uuid,
                health=pb.GPU_HEALTH_OK,
                power_w=300.0 + (second + i) % 7,
                energy_j=300.0 * second,
                sm_mhz=1200,
                memory_mhz=2619,
                temperature_c=55.0,
                utilization_ratio=0.8,
                power_limit_w=700.0,
            )
            for i, uuid in enumerate(self._uuids)
        ]
        instances = [
            pb.InstanceSample(
                instance_id=instance.spec.instance_id,
                state=instance.state,
                requests_running=float((self._number + slot + second) % 9),
                requests_waiting=0.0,
                kv_cache_usage_ratio=(self._number * 7 + slot + second) % 23 / 100,
            )
            for slot, instance in enumerate(self._instances)
        ]
        return pb.WatchTelemetryResponse(node_id=f"n{self._number}", sequence=second, gpus=gpus, instances=instances)


async def serve(folder: str, count: int) -> None:
    made: Any = Agent  # calls that it has no method for are refused by gRPC
    servers = []
    for number in range(count):
        server = grpc.aio.server()
        agent = made(number)
        rpc.add_NodeAgentServicer_to_server(agent, server)
        server.add_insecure_port(f"unix:{folder}/{number}")
        await server.start()
        servers.append(server)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await asyncio.gather(*(server.stop(None) for server in servers))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
