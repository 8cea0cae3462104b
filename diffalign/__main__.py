"""``accelerate launch -m diffalign train CONFIG ...`` and ``python -m diffalign ...``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
