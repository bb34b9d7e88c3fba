"""Who may look: requests for this host, from pages of this host, with the token if there is one.

A page of any site can send requests to a server on the same machine, and by DNS rebinding read the answers
too. So the name in the header `Host` is checked, also on 127.0.0.1.
"""

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "rebeca_gallery"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# No script but ours, and nothing from other hosts.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """ASGI middleware: refuse requests for other hosts, from other pages, and without the token."""

    def __init__(self, app: ASGIApp, hosts: list[str], token: str | None) -> None:
        self.app, self.hosts, self.token = app, {host.lower() for host in hosts}, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is not None:
            refusal.headers.update(HEADERS)
            await refusal(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, with_headers)

    def refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that may not pass, None for any other."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if name_of(host) not in self.hosts:
            known = ", ".join(sorted(self.hosts))
            return plain(
                f"host {host!r}: this gallery answers for {known}; start it with --name {name_of(host)}",
                421,
            )
        origin = headers.get("origin")
        if origin is None and scope["method"] not in ("GET", "HEAD"):  # browsers send it with each form
            return plain("a form must come from a page of this gallery: the header Origin is missing", 403)
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return plain(f"origin {origin!r}: pages of other sites may not ask this gallery", 403)
        # Browsers say where a request comes from. A link from elsewhere may lead here, nothing else.
        is_link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_link:
            return plain("pages of other sites may not ask this gallery", 403)
        return self.token_refusal(scope, headers) if self.token else None

    def token_refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Return a redirect that sets the cookie for the right token in the address, or an error."""
        assert self.token is not None
        given = QueryParams(scope["query_string"]).get("token")
        if given is not None and self.is_token(given):
            response = RedirectResponse("/", status_code=303)
            response.set_cookie(COOKIE, self.token, httponly=True, samesite="lax")
            return response
        if self.is_token(cookie_of(headers)):
            return None
        return plain("the token is missing or wrong: open the address that `rebeca gallery` printed", 401)

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), str(self.token).encode())


def name_of(host: str) -> str:
    """Return the name in a header `Host`, without its port; empty if there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def cookie_of(headers: Headers) -> str:
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""


def plain(text: str, status: int) -> PlainTextResponse:
    return PlainTextResponse(f"{text}\n", status_code=status)
