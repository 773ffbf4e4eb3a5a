"""Pieces that the jinja templates of several formats share; their output is only what stands in expressions."""

from __future__ import annotations

TOOL_ROLES = "['tool', 'function', 'observation']"

ARGUMENTS = r"""
{%- set arguments = call['function']['arguments'] -%}
{%- if arguments is not string -%}{%- set arguments = arguments | tojson -%}{%- endif -%}
"""
"""Sets `arguments` to the JSON text of `call`."""


def quote(text: str) -> str:
    """Return a text as a jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def split_system(default: str | None) -> str:
    """Return the part that sets `system` (or the default, or none) and `turns`, the other messages."""
    return (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
        f"{{%- else -%}}{{%- set system = {'none' if default is None else quote(default)} -%}}"
        "{%- set turns = messages -%}{%- endif -%}"
    )


def refuse_tools(name: str) -> str:
    """Return the part that raises where tools are given."""
    return f"{{%- if tools -%}}{{{{- raise_exception('the chat format {name} has no tools') -}}}}{{%- endif -%}}"


def refuse_role(name: str) -> str:
    """Return the part that raises for the role of `message`."""
    return f"{{{{- raise_exception('the chat format {name} has no role ' ~ message['role']) -}}}}"


def compact(template: str) -> str:
    """Return a template on one line; line breaks between its tags, as all its text stands in string literals."""
    return "".join(line.strip() for line in template.splitlines())
