"""The REST client: finds the API, speaks to it, and raises what it answers as the errors of ``pfvol.errors``.

``Client`` is synchronous (the command line), ``AsyncClient`` is the same on trio. Both share the pure halves: how a
request is built and what an answer means. httpx2 is imported when a client is made, because ``pfvol --help`` must not
pay for it.
"""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pfvol.constants import API_PORT_DEFAULT, CONNECT_TIMEOUT_SECONDS
from pfvol.errors import (
    ConfigError,
    Error,
    InvalidError,
    ProtocolError,
    TimedOutError,
    UnauthorizedError,
    UnreachableError,
)

if TYPE_CHECKING:
    import httpx2

# An unmap or a delete is answered when every SDS has obeyed; that is bounded by the RPC deadlines, not by this.
REQUEST_TIMEOUT_SECONDS = 60.0
Fields = Mapping[str, Any]

CLUSTER_FILE = "cluster.json"
TOKEN_FILE = "token"
TOKEN_HINT = "give the cluster's --data-dir, or set PFVOL_TOKEN"


class Endpoint(NamedTuple):
    """Where the API is, and the token that opens it (None: none was found)."""

    url: str
    token: str | None


def api_url(text: str) -> str:
    """``HOST:PORT`` or a URL, as the URL without a trailing slash."""
    url = text if "://" in text else f"http://{text}"
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https") or not rest.strip("/"):
        raise ConfigError(f"API address {text!r} is not HOST:PORT nor an http(s) URL")
    return url.rstrip("/")


def read_cluster(data_dir: Path) -> dict[str, Any] | None:
    """``cluster.json`` of a data dir; None when there is none."""
    path = data_dir / CLUSTER_FILE
    try:
        cluster = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ConfigError(f"cannot read {path}: permission denied; run as its owner, or set PFVOL_API") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); `pfvol cluster up` writes it anew") from error
    if not isinstance(cluster, dict) or not isinstance(cluster.get("api"), str):
        raise ConfigError(f"{path} names no api; `pfvol cluster up` writes it anew")
    return cluster


def find_endpoint(
    *, api: str | None, mdm: str | None, token: str | None, data_dir: Path, config: Path | None
) -> Endpoint:
    """The first of: ``api``; the cluster in ``data_dir`` (unless ``mdm`` names another); ``mdm``'s host; ``config``.

    Raises ``UnreachableError`` when nothing says where the API is.
    """
    if api is not None:
        return Endpoint(api_url(api), token or _token_of(data_dir, api_url(api)))
    cluster = read_cluster(data_dir)
    if cluster is not None and mdm in (None, cluster.get("mdm")):
        return Endpoint(api_url(cluster["api"]), token or cluster.get("token"))
    if mdm is not None:
        return Endpoint(api_url(f"{mdm.rpartition(':')[0] or mdm}:{API_PORT_DEFAULT}"), token)
    if config is not None:
        return _endpoint_of_config(config, token)
    raise UnreachableError(
        f"no cluster is configured: there is no {data_dir / CLUSTER_FILE}; start one with `pfvol cluster up`, "
        "or name one with --api (PFVOL_API) and PFVOL_TOKEN",
        data_dir=str(data_dir),
    )


def _token_of(data_dir: Path, url: str) -> str | None:
    """The token of the cluster in ``data_dir`` if that is at ``url``; what is wrong there is no concern here."""
    with contextlib.suppress(ConfigError):
        cluster = read_cluster(data_dir)
        if cluster is not None and api_url(cluster["api"]) == url:
            return cluster.get("token")
    return None


def _endpoint_of_config(path: Path, token: str | None) -> Endpoint:
    """The API of a node's configuration file: the MDM it names, and the token in its data dir when it is the MDM's."""
    try:
        config = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use configuration file {path}: {error}") from error
    mdm, node, cluster = (config.get(name, {}) for name in ("mdm", "node", "cluster"))
    if not all(isinstance(table, dict) for table in (mdm, node, cluster)):
        raise ConfigError(f"{path}: [mdm], [node] and [cluster] must be tables")
    host = str(cluster.get("mdm", "")).rpartition(":")[0] or _reachable(str(node.get("bind", "")))
    if token is None and "data_dir" in node:
        with contextlib.suppress(OSError):
            token = (Path(str(node["data_dir"])) / str(node.get("name", "")) / TOKEN_FILE).read_text().strip()
    return Endpoint(api_url(f"{host}:{mdm.get('api_port', API_PORT_DEFAULT)}"), token)


def _reachable(bind: str) -> str:
    """The host, as in a URL, at which this machine reaches what listens on ``bind``."""
    if bind in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{bind}]" if ":" in bind else bind


def error_of(status: int, body: Any) -> Error:
    """The error that an answer of ``status`` >= 400 carries."""
    if not isinstance(body, dict) or "code" not in body:
        return ProtocolError(f"the API answered {status} without saying why; is it pfvol that listens there?")
    details = body.get("details")
    if status == 401:
        return UnauthorizedError(
            f"{body.get('detail')}; {TOKEN_HINT}", **(details if isinstance(details, dict) else {})
        )
    if status == 422:
        return InvalidError(str(body.get("detail")), **(details if isinstance(details, dict) else {}))
    return Error.from_wire({"code": body["code"], "message": body.get("detail", body.get("title")), "details": details})


def _result(url: str, response: httpx2.Response) -> Any:
    try:
        body = response.json()
    except ValueError as error:
        if response.status_code >= 400:
            raise error_of(response.status_code, None) from error
        raise ProtocolError(f"{url} did not answer in JSON; is it pfvol that listens there?") from error
    if response.status_code >= 400:
        raise error_of(response.status_code, body)
    return body


@contextlib.contextmanager
def _mapped(url: str) -> Iterator[None]:
    """httpx2's exceptions as ours, at this one seam."""
    import httpx2

    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise UnreachableError(
            f"nobody answers at {url}; is the cluster up (`pfvol cluster status`)?", api=url
        ) from error
    except httpx2.TimeoutException as error:
        raise TimedOutError(f"{url} gave no answer in time; the change may still happen", api=url) from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ConfigError(f"API address {url!r} is not usable: {error}") from error
    except httpx2.TransportError as error:
        raise UnreachableError(
            f"the connection to {url} was lost before the answer; the change may or may not have been made", api=url
        ) from error


def _options(endpoint: Endpoint, timeout_seconds: float) -> dict[str, Any]:
    import httpx2

    if endpoint.token is not None and not (endpoint.token.isascii() and endpoint.token.isprintable()):
        raise ConfigError("the token has characters that no token has; is PFVOL_TOKEN what it should be?")
    # trust_env off: a proxy of the environment must not see the token, and loopback never goes through one.
    return {
        "base_url": endpoint.url,
        "headers": {"Authorization": f"Bearer {endpoint.token}"} if endpoint.token else {},
        "timeout": httpx2.Timeout(timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS),
        "trust_env": False,
    }


def _given(values: Fields | None) -> dict[str, Any]:
    return {key: value for key, value in (values or {}).items() if value is not None}


class Client:
    """Synchronous; a context manager. What is None is left out of queries and bodies."""

    def __init__(self, endpoint: Endpoint, *, timeout_seconds: float = REQUEST_TIMEOUT_SECONDS) -> None:
        import httpx2

        self.endpoint = endpoint
        with _mapped(endpoint.url):
            self._http = httpx2.Client(**_options(endpoint, timeout_seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.close()

    def request(self, method: str, path: str, *, query: Fields | None = None, body: Fields | None = None) -> Any:
        with _mapped(self.endpoint.url):
            response = self._http.request(
                method, path, params=_given(query), json=None if body is None else _given(body)
            )
        return _result(self.endpoint.url, response)

    def get(self, path: str, **query: Any) -> Any:
        return self.request("GET", path, query=query)

    def post(self, path: str, **body: Any) -> Any:
        return self.request("POST", path, body=body)

    def patch(self, path: str, **body: Any) -> Any:
        return self.request("PATCH", path, body=body)

    def delete(self, path: str, **query: Any) -> Any:
        return self.request("DELETE", path, query=query)


class AsyncClient:
    """``Client`` on trio; an async context manager."""

    def __init__(self, endpoint: Endpoint, *, timeout_seconds: float = REQUEST_TIMEOUT_SECONDS) -> None:
        import httpx2

        self.endpoint = endpoint
        with _mapped(endpoint.url):
            self._http = httpx2.AsyncClient(**_options(endpoint, timeout_seconds))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._http.aclose()

    async def request(self, method: str, path: str, *, query: Fields | None = None, body: Fields | None = None) -> Any:
        with _mapped(self.endpoint.url):
            response = await self._http.request(
                method, path, params=_given(query), json=None if body is None else _given(body)
            )
        return _result(self.endpoint.url, response)

    async def get(self, path: str, **query: Any) -> Any:
        return await self.request("GET", path, query=query)

    async def post(self, path: str, **body: Any) -> Any:
        return await self.request("POST", path, body=body)

    async def patch(self, path: str, **body: Any) -> Any:
        return await self.request("PATCH", path, body=body)

    async def delete(self, path: str, **query: Any) -> Any:
        return await self.request("DELETE", path, query=query)
