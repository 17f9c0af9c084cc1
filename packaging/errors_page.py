"""docs/errors.md, made from the table of errors (`etcdlite/errors.py`) and from what is said here.

    PYTHONPATH=. python3 packaging/errors_page.py       rewrites the page

A test compares the page, and fails if an error has no advice.
"""

# ruff: noqa: E501 (rows of tables)

from __future__ import annotations

from pathlib import Path

from etcdlite.errors import CODE_NAMES, ERRORS

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"

HEAD = """\
# Errors and alarms

<!-- Made by packaging/errors_page.py: change that, not this. -->

What a member answers when it does not do what it was asked, and what to do then. Texts and codes are
etcd's; in front of each text stands `etcdserver: `. A text that begins with `etcdlite: ` is about something
that etcd does not have; it says itself what to do. What a member writes into its log is in
[clustering.md](clustering.md#what-the-log-says), errors of TLS are in
[tls.md](tls.md#when-a-connection-fails), the exit status of etcdlite-ctl is in
[etcdlite-ctl.md](etcdlite-ctl.md#exit-status), that of etcdlite in `man etcdlite`.

Where a client may repeat a request, it must know that a write which failed with `Unavailable` may have
taken effect.

## Alarms

`etcdlite-ctl alarm list` shows them, `/health` answers 503, and the metric
`etcd_server_health_failures` grows.

| alarm | what it means | what to do |
|---|---|---|
| `NOSPACE` | the quota of a member is used up, or its file system is almost full. Puts are refused, reads and deletes are served | [Full disk](operating.md#full-disk) |
| `CORRUPT` | the data of two members differs at the same revision. Writes are refused | [Members that differ](operating.md#members-that-differ) |
| `DAMAGED` (in `endpoint status` and `/health`, no alarm of etcd's) | a member found a damaged record on its disk | [A disk returns wrong data](operating.md#a-disk-returns-wrong-data) |
"""

GROUPS: dict[str, dict[str, str]] = {
    "Availability": {
        "NoLeader": "No quorum. Start the members that are down; see [More than half is lost]"
        "(operating.md#more-than-half-is-lost).",
        "NotLeader": "Ask the leader: `endpoint status --cluster` shows it.",
        "LeaderChanged": "Repeat the request.",
        "Stopped": "The member stops. Ask another one.",
        "Timeout": "No answer in time. Look at `endpoint status --cluster` and at the disks; repeat.",
        "TimeoutDueToLeaderFail": "The leader was lost. Repeat; a write may have taken effect.",
        "TimeoutDueToConnectionLost": "The member lost the others. Repeat on another one; a write "
        "may have taken effect.",
        "TimeoutWaitAppliedIndex": "The member is behind. Repeat, or ask another one.",
        "Unhealthy": "A voting member has not been in contact for the last 5 seconds, and the others "
        "are too few for this change. `etcdlite-ctl doctor` shows which is missing: bring it back, "
        "or repeat after a change of members.",
        "RequestTooManyRequests": "Too much waits. Repeat later, with fewer requests in flight "
        "([limits.md](limits.md)).",
        "Corrupt": "The answer needs a damaged record, or the alarm CORRUPT is raised: see above.",
        "Canceled": "The client gave up.",
        "DeadlineExceeded": "The client's own time limit passed; a write may have taken effect.",
    },
    "Keys and revisions": {
        "EmptyKey": "Name a key.",
        "KeyNotFound": "The put with `ignore_value` or `ignore_lease` needs a key that exists.",
        "ValueProvided": "Leave out the value, or `ignore_value`.",
        "LeaseProvided": "Leave out the lease, or `ignore_lease`.",
        "TooManyOps": "Split the transaction, or raise `max-txn-ops`.",
        "DuplicateKey": "A transaction may write a key once.",
        "RequestTooLarge": "Split the request, or raise `max-request-bytes` on all members.",
        "InvalidSortOption": "Choose a sort target and an order that exist.",
        "Compacted": "That history is gone. Read the keys again, and watch from the revision of "
        "that answer.",
        "FutureRev": "That revision does not exist yet. After a restore, read the keys again.",
        "NoSpace": "[Full disk](operating.md#full-disk).",
        "WatchCanceled": "The server ended the watch. Create it again.",
        "InvalidClientAPIVersion": "Use a client of etcd v3.",
    },
    "Leases": {
        "LeaseNotFound": "It ended or was revoked. Grant a new one and put its keys again.",
        "LeaseExist": "Choose another ID, or let the server choose.",
        "LeaseTTLTooLarge": "At most 9,000,000,000 seconds.",
    },
    "Members": {
        "MemberExist": "Add it with another ID, or remove the old one.",
        "PeerURLExist": "A member has that URL. Remove it first, or correct the URL.",
        "MemberNotEnoughStarted": "Too few members run. Start them first.",
        "MemberBadURLs": "Write URLs like `http://10.0.0.1:2380`.",
        "MemberNotFound": "`member list` shows the members.",
        "MemberNotLearner": "It has a vote already.",
        "LearnerNotReady": "It has not caught up. Wait, then repeat.",
        "TooManyLearners": "Promote or remove the learner that there is, or raise `max-learners`.",
        "ClusterIDMismatch": "The member belongs to another cluster: correct the URL, or "
        "`initial-cluster` and the token of the new member.",
        "NotSupportedForLearner": "Ask a voting member. Etcd's Go clients do so themselves if they "
        "know one; those of 3.4 and 3.5 get 14 Unavailable for that, on which those before 3.5.14 "
        "repeat reads only.",
        "BadLeaderTransferee": "The new leader must be a voting member.",
        "NotCapable": "The cluster does not have that feature yet.",
    },
    "Users": {
        "RootUserNotExist": "`etcdlite-ctl user add root`.",
        "RootRoleNotExist": "`etcdlite-ctl user grant-role root root`.",
        "UserAlreadyExist": "Choose another name.",
        "UserEmpty": "Authentication is enabled: name a user (`--user`).",
        "UserNotFound": "`user list` shows the users.",
        "RoleAlreadyExist": "Choose another name.",
        "RoleNotFound": "`role list` shows the roles.",
        "RoleEmpty": "Name a role.",
        "AuthFailed": "Wrong user or password.",
        "PermissionNotGiven": "Say which permission.",
        "PermissionDenied": "The roles of the user do not allow it ([auth.md](auth.md)).",
        "RoleNotGranted": "The user does not have that role.",
        "PermissionNotGranted": "The role has no such permission; name the range that was granted.",
        "AuthNotEnabled": "`etcdlite-ctl auth enable`.",
        "InvalidAuthToken": "Log in again. Clients do it by themselves.",
        "InvalidAuthMgmt": "Authentication needs the user and the role `root`: disable it first, or leave them. Or the range of a new permission is empty: its end must come after its key.",
        "AuthOldRevision": "Users or roles changed during a long read: repeat it. Or they changed after a JSON Web Token was issued: log in again.",
    },
    "Downgrades": {
        "WrongDowngradeVersionFormat": "Write a version of etcdlite, like `0.1`.",
        "InvalidDowngradeTargetVersion": "Only the version of etcdlite before the cluster's is possible, such as 0.1 for 0.2 ([upgrading.md](upgrading.md)).",
        "ClusterVersionUnavailable": "The cluster version was changed by another request. Look at `downgrade status`, then repeat.",
        "DowngradeInProcess": "A downgrade is enabled already. Finish it, or `etcdlite-ctl downgrade cancel`.",
        "NoInflightDowngrade": "No downgrade is enabled, so there is nothing to cancel.",
    },
}
"""What to do, by the name of the error."""


def page() -> str:
    out = [HEAD]
    for title, members in GROUPS.items():
        out += [f"## {title}", "", "| text | code | what to do |", "|---|---|---|"]
        for name, advice in members.items():
            code, text = ERRORS[name]
            shown = text.removeprefix("etcdserver: ")
            out.append(f"| `{shown}` | {code} {CODE_NAMES[code]} | {advice} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
