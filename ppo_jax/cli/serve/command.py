"""`ppo-jax serve-reward`. The server itself needs the packages of the extra `serve`."""

from ppo_jax.cli.serve.settings import ServeSettings


def serve_reward(settings: ServeSettings) -> None:
    """Run `ppo-jax serve-reward`."""
    try:
        from ppo_jax.cli.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise ValueError("the reward server needs two more packages: pip install 'ppo_jax[serve]'") from error
    serve(settings)
