"""What is wrong with a JSON file of ours, in words."""

from pydantic import ValidationError


def first_fault(error: ValidationError) -> str:
    """Say the first thing that is wrong, and where."""
    fault = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else fault["msg"]
