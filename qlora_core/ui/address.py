"""What the page's address names, so that a reload and a shared link show it again. A browser's script writes it."""

# The text of a selection before the page has asked what its address names; until then the address stays as it is.
NOT_ATTACHED = "?"


def in_address(name: str, value: str, *, only_if: str = "true") -> str:
    """Script of a listener whose input is such a selection, `selected`: the name gets the value, or goes where that is empty.

    `value` and `only_if` are JavaScript.
    """
    return f"""(selected) => {{
  const url = new URL(window.location), value = {value};
  if (selected === '{NOT_ATTACHED}' || !({only_if})) return;
  if (value) {{ url.searchParams.set('{name}', value); }} else {{ url.searchParams.delete('{name}'); }}
  window.history.replaceState(window.history.state, '', url);
}}"""
