"""What is answered in place of a result: errors in the shape that the official client reads."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

RETRY_SECONDS = 1
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}


class Fault(HTTPException):
    """An error of this status: `param` is the field that it is about, `code` a name for programs.

    With `retry` clients are told when to come again, else that it is of no use.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry: bool = False) -> None:
        wait = {"Retry-After": str(RETRY_SECONDS)} if retry else {"x-should-retry": "false"}
        headers = wait | ({"WWW-Authenticate": "Bearer"} if status == 401 else {})
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def response(self) -> JSONResponse:
        """As the client reads it."""
        return JSONResponse({"error": self.content()}, self.status_code, self.headers)

    def content(self) -> dict[str, Any]:
        """The client's fields."""
        kind = _KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"message": self.detail, "type": kind, "param": self.param, "code": self.code}


def of_validation(error: RequestValidationError) -> Fault:
    """The first thing that is wrong with the fields of a request; what was found is not repeated."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return Fault(400, "the request is no JSON; expected an object of the fields", "invalid_json")
    param = place[0].partition("[")[0] if place else None
    if first["type"] == "extra_forbidden":
        return Fault(422, "there is no such field; leave it out", "unknown_parameter", param)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    # A tag's own message would repeat what was found.
    is_tag = first["type"] == "union_tag_invalid"
    message = f"expected one of {first['ctx']['expected_tags']}" if is_tag else first["msg"]
    return Fault(422, f"{param or 'request'}: {message}", code, param)


def register(app: FastAPI) -> None:
    """Have the application answer in this shape, whatever goes wrong."""

    @app.exception_handler(RequestValidationError)
    async def answer_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, Fault):
            return error.response()
        code = _CODES.get(error.status_code, "error")
        return Fault(error.status_code, error.detail, code).response()

    @app.exception_handler(Exception)
    async def answer_any(request: Request, error: Exception) -> JSONResponse:
        # Its text may name files: it goes to the web server's log alone.
        return Fault(500, "the server failed; its log says why", "server_error").response()
