"""One question to whoever listens at an address, before Ray connects.

Ray asks a service that refuses it for half a minute, fills stderr from its own C++ code, and in the end does not say
why: that this process has not the cluster's token, or that the port is another service's.
"""

from __future__ import annotations

from nemotron_fp8.errors.cluster import ClusterRefusedError

GREET_SECONDS = 5.0
HEAD = ("/ray.rpc.NodeInfoGcsService/GetClusterId", b"")
"""gRPC method and request that a head answers: `gcs_service.proto` of Ray."""
CLIENT_SERVER = ("/ray.rpc.RayletDriver/ClusterInfo", b"\x08\x06")
"""What the server of clients answers, a `ClusterInfoRequest` of type PING: `ray_client.proto` of Ray."""
NO_TOKEN = (
    "wants a token, and this process has none or another; give it the cluster's: RAY_AUTH_MODE=token, and"
    " RAY_AUTH_TOKEN or ~/.ray/auth_token"
)
OTHER_PORT = (
    "is the port of another service; HOST:PORT takes the --port of `ray start --head` (6379), ray://HOST:PORT its"
    " --ray-client-server-port (10001)"
)


def describe_listener(address: str) -> None:
    """Ask once; say nothing where the answer is not a clear refusal: Ray will find out by itself.

    Args:
        address: ``HOST:PORT``, ``ray://HOST:PORT``, or ``auto`` for the one head that this machine knows.

    Raises:
        ClusterRefusedError: the service wants another token, or is not the one that the address is for.
    """
    try:
        import grpc
        from ray._private.grpc_utils import init_grpc_channel
        from ray._private.services import find_gcs_addresses
        from ray.exceptions import AuthenticationError
    except ImportError:  # Ray's insides, of a version that has others
        return
    try:
        if address == "auto":
            (address,) = find_gcs_addresses()
        method, request = CLIENT_SERVER if address.startswith("ray://") else HEAD
        with init_grpc_channel(address.removeprefix("ray://")) as channel:
            channel.unary_unary(method)(request, timeout=GREET_SECONDS)
    except AuthenticationError:  # a token is wanted here, too, and there is none
        raise ClusterRefusedError(address, NO_TOKEN) from None
    except grpc.RpcError as error:
        refusals = {grpc.StatusCode.UNAUTHENTICATED: NO_TOKEN, grpc.StatusCode.UNIMPLEMENTED: OTHER_PORT}
        if error.code() in refusals:
            raise ClusterRefusedError(address, refusals[error.code()]) from error
    except Exception:
        return
