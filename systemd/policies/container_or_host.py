"""By pipeline and plugins, a job runs on the host itself, in a throw-away container, or not at all.

POLICY_FILE=/etc/stack/container_or_host.py. Each machine has slots of two kinds: those of the host itself, and those
whose BUILDKITE_AGENT_PATH is `agent-in-container`, which stands beside this file. In worker-1.env and worker-2.env:

    WORKER_AGENT_QUERY_RULES=queue=default,runtime=host
    WORKER_AGENT_QUERY_RULES=queue=default,runtime=container
"""

#: What may run on the host itself: pipelines that build images or deploy.
TRUSTED = {"images", "deploy"}
#: Plugins that need the host's Docker, which no container of ours has.
NEED_HOST = {"docker", "docker-compose"}


def decide(job, fleet):
    plugins = {name.partition("#")[0].rpartition("/")[2].removesuffix("-buildkite-plugin") for name in names(job)}
    if job.pipeline in TRUSTED:
        return run(require=["runtime=host"])
    if plugins & NEED_HOST:
        return refuse("only trusted pipelines use Docker on our machines: ask the platform team")
    return run(require=["runtime=container"])


def names(job):
    """The plugins of a job as they are written: "docker#v5.9.0"."""
    for plugin in job.plugins:
        yield from plugin if isinstance(plugin, dict) else [str(plugin)]
