"""What drops groups, or candidates of groups, before pairs are made of them."""

FILTERS: dict[str, type] = {}

__all__ = ["FILTERS"]
