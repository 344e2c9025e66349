"""Builds of forks run on throw-away machines alone: on workers with the tag trust=low.

POLICY_FILE=/etc/stack/forks.py. A pull request of a public repository brings code that nobody of yours has read. Give
the machines that are made anew for each job WORKER_AGENT_QUERY_RULES=queue=default,trust=low. They also take your own
jobs, unless yours ask for something that they do not have.
"""

import re


def decide(job, fleet):
    if job.env.get("BUILDKITE_PULL_REQUEST", "false") == "false":
        return run()
    theirs = repository(job.env.get("BUILDKITE_PULL_REQUEST_REPO", ""))
    if theirs and theirs == repository(job.env.get("BUILDKITE_REPO", "")):
        return run()  # a branch of our own repository
    return run(require=["trust=low"])


def repository(url):
    """ "host/owner/name", from git@host:owner/name.git or https://host/owner/name; "" from any other text."""
    found = re.fullmatch(r"(?:\w+://)?(?:[^@/]*@)?([\w.-]+)(?::\d+)?[:/]/?([^:]+?)(?:\.git)?/?", url)
    return f"{found[1]}/{found[2]}".lower() if found else ""
