"""`ppo-jax serve-reward`. The server itself needs the packages of the extra `serve`."""

from ppo_jax.cli.serve.settings import ServeSettings
from ppo_jax.data.extras import install_line


def serve_reward(settings: ServeSettings) -> None:
    """Run `ppo-jax serve-reward`."""
    try:
        from ppo_jax.cli.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise ValueError(f"the reward server needs more packages: {install_line('serve')}") from error
    serve(settings)
