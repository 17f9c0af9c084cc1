"""The commands about users, roles, and whether they count: user, role, auth.

Passwords are asked for on the terminal, without echo, or read from standard input. They are taken
from the command line too, as etcdctl does, where others on the machine can see them.
"""

from __future__ import annotations

from functools import partial

from etcdlite import proto
from etcdlite.cli.failures import BadArguments, say
from etcdlite.cli.session import Session, ask_password, input_line
from etcdlite.client import EtcdliteError
from etcdlite.client.operations import prefix_end
from etcdlite.errors import ERRORS

_PERMISSIONS = proto.ENUMS["Permission.Type"]

_FIRST_KEY = _OPEN_END = b"\x00"
"""As the start of a range: the first key. As its end: no end."""


def _new_password(name: str, session: Session) -> str:
    if not session.flags["interactive"]:
        return input_line().strip()
    password = ask_password(f"Password of {name}: ")
    if not password:
        raise BadArguments("empty password")
    if ask_password(f"Type password of {name} again for confirmation: ") != password:
        raise BadArguments("given passwords are different")
    return password


# Users.


def user_add(session: Session) -> None:
    (name,) = session.need(1, "user add command requires user name as its argument")
    password = ""
    has_password = not session.flags["no-password"]
    if has_password and session.flags["new-user-password"]:
        password = session.flags["new-user-password"]
    elif has_password and ":" in name:
        name, _, password = name.partition(":")
        if not name:
            raise BadArguments("empty user name is not allowed")
    elif has_password:
        password = _new_password(name, session)
    if has_password and not password:
        raise BadArguments("empty password (--no-password makes a user who needs a certificate)")
    options = proto.UserAddOptions(no_password=not has_password)
    response = session.ask("Auth.UserAdd", name=name, password=password, options=options)
    session.show("done", response, f"User {name} created")


def _change(
    session: Session, command: str, method: str, field: str = "name", done: str = "deleted"
) -> None:
    """Run a command that takes one argument: the name of a user or a role."""
    kind = command.partition(" ")[0]
    (name,) = session.need(1, f"{command} command requires {kind} name as its argument")
    response = session.ask(method, None, **{field: name})
    session.show("done", response, f"{kind.title()} {name} {done}")


user_delete = partial(_change, command="user delete", method="Auth.UserDelete")
role_add = partial(_change, command="role add", method="Auth.RoleAdd", done="created")
role_delete = partial(_change, command="role delete", method="Auth.RoleDelete", field="role")


def user_get(session: Session) -> None:
    (name,) = session.need(1, "user get command requires user name as its argument")
    response = session.ask("Auth.UserGet", name=name)
    if not session.flags["detail"]:
        session.show("user_get", response, name)
        return
    session.print(f"User: {name}")
    for role in response.roles:
        session.print("")
        session.show("role_get", session.ask("Auth.RoleGet", role=role), role)


def user_list(session: Session) -> None:
    session.need(0, "user list command requires no arguments")
    session.show("user_list", session.ask("Auth.UserList"))


def user_passwd(session: Session) -> None:
    (name,) = session.need(1, "user passwd command requires user name as its argument")
    password = _new_password(name, session)
    response = session.ask("Auth.UserChangePassword", name=name, password=password)
    session.show("done", response, "Password updated")


def user_grant_role(session: Session) -> None:
    usage = "user grant command requires user name and role name as its argument"
    name, role = session.need(2, usage)
    response = session.ask("Auth.UserGrantRole", user=name, role=role)
    session.show("done", response, f"Role {role} is granted to user {name}")


def user_revoke_role(session: Session) -> None:
    usage = "user revoke-role requires user name and role name as its argument"
    name, role = session.need(2, usage)
    response = session.ask("Auth.UserRevokeRole", name=name, role=role)
    session.show("done", response, f"Role {role} is revoked from user {name}")


# Roles.


def role_get(session: Session) -> None:
    (name,) = session.need(1, "role get command requires role name as its argument")
    session.show("role_get", session.ask("Auth.RoleGet", role=name), name)


def role_list(session: Session) -> None:
    session.need(0, "role list command requires no arguments")
    session.show("role_list", session.ask("Auth.RoleList"))


def _permission_range(session: Session, arguments: list[str]) -> tuple[bytes, bytes]:
    """The range that a permission is for, of the arguments <key> [endkey]."""
    key, *ends = (argument.encode("utf-8", "surrogateescape") for argument in arguments)
    prefix, from_key = session.flags["prefix"], session.flags["from-key"]
    if prefix and from_key and (not ends or not key):
        raise BadArguments("--from-key and --prefix flags are mutually exclusive")
    if not key:
        # A permission for nothing but the empty key, or for all keys.
        return _FIRST_KEY, _OPEN_END if prefix or from_key else b""
    if not ends:
        return key, prefix_end(key) if prefix else _OPEN_END if from_key else b""
    if prefix or from_key:
        flag = "--prefix" if prefix else "--from-key"
        raise BadArguments(f"unexpected endkey argument with {flag} flag")
    return key, ends[0]


def role_grant_permission(session: Session) -> None:
    arguments = session.arguments
    if len(arguments) < 3:
        raise BadArguments(
            "role grant command requires role name, permission type, and key [endkey] as its "
            "argument"
        )
    name, kind = arguments[:2]
    if kind.upper() not in _PERMISSIONS:
        raise BadArguments(f"invalid permission type: {kind}")
    key, end = _permission_range(session, arguments[2:])
    permission = proto.Permission(permType=_PERMISSIONS[kind.upper()], key=key, range_end=end)
    response = session.ask("Auth.RoleGrantPermission", name=name, perm=permission)
    session.show("done", response, f"Role {name} updated")


def role_revoke_permission(session: Session) -> None:
    arguments = session.arguments
    if len(arguments) < 2:
        raise BadArguments(
            "role revoke-permission command requires role name and key [endkey] as its argument"
        )
    name = arguments[0]
    key, end = _permission_range(session, arguments[1:])
    response = session.ask("Auth.RoleRevokePermission", role=name, key=key, range_end=end)
    # As in etcdctl, what is shown is the argument: an empty key stays empty.
    session.show("role_revoke_permission", response, name, arguments[1], end)


# Authentication.


def auth_enable(session: Session) -> None:
    session.need(0, "auth enable command does not accept any arguments")
    try:
        _enable(session)
    except EtcdliteError as error:
        if error.text != ERRORS["RootRoleNotExist"][1]:
            raise
        _give_root_its_role(session)
        _enable(session)
    session.print("Authentication Enabled")


def _enable(session: Session) -> None:
    session.ask("Auth.AuthEnable")
    if not session.flags["user"]:
        return
    # The commands after this one need a login: report at once that it fails.
    try:
        with session.client_for(session.endpoints) as client:
            session.ask("Auth.AuthStatus", client)
    except EtcdliteError as error:
        say(
            f"Warning: authentication is enabled, but {session.user} could not log in: {error.text}"
        )


def _give_root_its_role(session: Session) -> None:
    try:
        session.ask("Auth.RoleAdd", name="root")
    except EtcdliteError as error:
        if error.text != ERRORS["RoleAlreadyExist"][1]:
            raise
    session.ask("Auth.UserGrantRole", user="root", role="root")


def auth_disable(session: Session) -> None:
    session.need(0, "auth disable command does not accept any arguments")
    session.ask("Auth.AuthDisable")
    session.print("Authentication Disabled")


def auth_status(session: Session) -> None:
    session.need(0, "auth status command does not accept any arguments")
    session.show("auth_status", session.ask("Auth.AuthStatus"))
