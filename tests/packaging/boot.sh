#!/bin/bash
# Runs as root in a freshly booted Debian with /root/etcdlite.deb and /root/next.deb, its next build,
# which tests/test_packaging.py makes. Each line of a person who follows the manual, and what it must
# lead to. Prints PASSED at the end.
set -eux
trap '[ $? = 0 ] || journalctl --no-pager -u "etcdlite*" | tail -n 60' EXIT
export DEBIAN_FRONTEND=noninteractive
cd /root

value() { etcdlite-ctl get "$@" --print-value-only; }
until_true() { for _ in $(seq 100); do if eval "$1"; then return; fi; sleep 0.3; done; echo "never: $1"; exit 1; }
pgrep_etcdlite() { grep -zqs /usr/bin/etcdlite /proc/[0-9]*/cmdline; }

# Installing: enabled, but only started when the configuration is what it should be.
apt-get install -y ./etcdlite.deb
test "$(systemctl is-enabled etcdlite)" = enabled
test "$(systemctl is-active etcdlite)" = inactive
test "$(systemctl is-enabled etcdlite-backup.timer)" = disabled
test "$(stat -c '%U %a' /var/lib/etcdlite)" = "etcdlite 700"
etcdlite --check-config

# The four commands of the README.
began=$(date +%s%N)
systemctl start etcdlite
echo "start to ready: $((($(date +%s%N) - began) / 1000000)) ms"
etcdlite-ctl member list
etcdlite-ctl endpoint health
etcdlite-ctl put greeting hello
test "$(value greeting)" = hello
test -d /var/lib/etcdlite/default.etcdlite
systemctl show etcdlite -p MemoryCurrent -p StatusText

# Reload, restart, kill, hang.
systemctl reload etcdlite
until_true 'journalctl -u etcdlite | grep -q "reloaded the log settings"'
systemctl restart etcdlite
test "$(value greeting)" = hello
kill -KILL "$(systemctl show etcdlite -p MainPID --value)"
until_true '[ "$(systemctl show etcdlite -p NRestarts --value)" = 1 ] && systemctl is-active -q etcdlite'
test "$(value greeting)" = hello
mkdir -p /etc/systemd/system/etcdlite.service.d
printf '[Service]\nWatchdogSec=3\nRestartSec=1\n' > /etc/systemd/system/etcdlite.service.d/test.conf
systemctl daemon-reload
systemctl restart etcdlite
sleep 6
test "$(systemctl show etcdlite -p NRestarts --value)" = 0
kill -STOP "$(systemctl show etcdlite -p MainPID --value)"
until_true '[ "$(systemctl show etcdlite -p NRestarts --value)" = 1 ] && systemctl is-active -q etcdlite'
journalctl -u etcdlite | grep -i watchdog
test "$(value greeting)" = hello

# A secret that only the service can read.
etcdlite-ctl secret new /root/peer.secret
cat > /etc/systemd/system/etcdlite.service.d/test.conf <<'END'
[Service]
LoadCredential=peer.secret:/root/peer.secret
Environment=ETCDLITE_PEER_SECRET_FILE=/run/credentials/etcdlite.service/peer.secret
END
systemctl daemon-reload
systemctl restart etcdlite
test "$(value greeting)" = hello
rm -r /etc/systemd/system/etcdlite.service.d
systemctl daemon-reload
systemctl restart etcdlite

# A wrong configuration is not tried again and again, and says what is wrong.
echo 'nmae = "x"' >> /etc/etcdlite.toml
if etcdlite --check-config; then exit 1; fi
if systemctl restart etcdlite; then exit 1; fi
test "$(systemctl is-active etcdlite)" = failed
journalctl -u etcdlite | grep -F 'unknown key nmae in /etc/etcdlite.toml, did you mean name?'
sed -i '$d' /etc/etcdlite.toml
systemctl restart etcdlite

# Backups: by hand, and every night.
etcdlite-ctl snapshot save backup.db
etcdlite-ctl snapshot restore backup.db --data-dir restored
# A large one in etcd's format is written by a process of its own, which the unit must allow.
for n in $(seq 12); do head -c 1000000 /dev/zero | tr '\0' x | etcdlite-ctl put "large$n"; done
etcdlite-ctl snapshot save --format etcd etcd.db
etcdlite-ctl snapshot restore etcd.db --data-dir restored-etcd
if journalctl -u etcdlite | grep -F 'writes a backup'; then exit 1; fi
etcdlite-ctl del --prefix large
systemctl enable --now etcdlite-backup.timer
systemctl start etcdlite-backup
test "$(find /var/backups/etcdlite -name '*.db' | wc -l)" = 1
for day in 01 02 03 04 05 06 07 08 09 10 11 12 13 14; do
    touch "/var/backups/etcdlite/2020-01-${day}T000000Z.db"
done
systemctl start etcdlite-backup
test "$(find /var/backups/etcdlite -name '*.db' | wc -l)" = 14
test ! -e /var/backups/etcdlite/2020-01-01T000000Z.db
systemctl stop etcdlite
if systemctl start etcdlite-backup; then exit 1; fi
systemctl --failed | grep etcdlite-backup
systemctl reset-failed etcdlite-backup
systemctl start etcdlite
(etcdlite-ctl doctor || test $? = 2) | grep 'the last backup failed'
systemctl start etcdlite-backup
etcdlite-ctl doctor

# A second member of its own on the same machine.
cat > /etc/etcdlite/m2.toml <<'END'
listen-client-urls = ["http://localhost:12379"]
listen-peer-urls = ["http://localhost:12380"]
END
systemctl start etcdlite@m2
etcdlite-ctl --endpoints 127.0.0.1:12379 put who m2
test -d /var/lib/etcdlite/m2.etcdlite
test "$(etcdlite-ctl --endpoints 127.0.0.1:12379 member list | cut -d, -f3)" = " m2"

# An upgrade restarts the service and keeps the data and the changed configuration.
sed -i 's/^#log-level.*/log-level = "debug"/' /etc/etcdlite.toml
before=$(systemctl show etcdlite -p MainPID --value)
m2_before=$(systemctl show etcdlite@m2 -p MainPID --value)
apt-get install -y ./next.deb
test "$(systemctl is-active etcdlite)" = active
test "$(systemctl show etcdlite -p MainPID --value)" != "$before"
test "$(systemctl show etcdlite@m2 -p MainPID --value)" != "$m2_before"
test "$(etcdlite-ctl --endpoints 127.0.0.1:12379 get who --print-value-only)" = m2
test "$(value greeting)" = hello
grep '^log-level = "debug"' /etc/etcdlite.toml
systemd-analyze security etcdlite | tail -1
systemd-analyze verify --man=no /lib/systemd/system/etcdlite*.service /lib/systemd/system/etcdlite*.timer

# A data directory of its own, and a wrong owner, as doctor and the log say it.
systemctl stop etcdlite
mkdir /srv/etcdlite
mv /var/lib/etcdlite/default.etcdlite /srv/etcdlite/data
echo 'data-dir = "/srv/etcdlite/data"' >> /etc/etcdlite.toml
if systemctl start etcdlite; then exit 1; fi
journalctl -u etcdlite | grep -F 'cannot use data directory /srv/etcdlite/data: Read-only file system. Mount its'
systemctl stop etcdlite
mkdir -p /etc/systemd/system/etcdlite.service.d
printf '[Service]\nReadWritePaths=/srv/etcdlite\n' > /etc/systemd/system/etcdlite.service.d/test.conf
systemctl daemon-reload
chown -R root: /srv/etcdlite/data
if systemctl start etcdlite; then exit 1; fi
journalctl -u etcdlite | grep -F 'belongs to root, and this process runs as etcdlite. As root: chown -R etcdlite: /srv/etcdlite/data'
systemctl stop etcdlite
chown -R etcdlite: /srv/etcdlite/data
chmod 600 /etc/etcdlite.toml
if systemctl start etcdlite; then exit 1; fi
journalctl -u etcdlite | grep -F 'Permission denied for user etcdlite'
(etcdlite-ctl doctor || test $? = 2) | grep -F 'the user etcdlite cannot read it'
systemctl stop etcdlite
chmod 644 /etc/etcdlite.toml
systemctl start etcdlite
test "$(value greeting)" = hello
apt-get remove -y etcdlite > removed
grep -F 'the data in /srv/etcdlite/data is left' removed
apt-get install -y ./next.deb
systemctl stop etcdlite
mv /srv/etcdlite/data /var/lib/etcdlite/default.etcdlite
sed -i '$d' /etc/etcdlite.toml
rm -r /etc/systemd/system/etcdlite.service.d /srv/etcdlite
systemctl daemon-reload
systemctl start etcdlite

# An installation starts again what a removal stopped, if it is enabled.
systemctl enable etcdlite@m2
cp /etc/etcdlite/m2.toml /etc/etcdlite/m3.toml
sed -i 's/:123/:133/' /etc/etcdlite/m3.toml
systemctl start etcdlite@m2 etcdlite@m3
apt-get remove -y etcdlite
if pgrep_etcdlite; then exit 1; fi
apt-get install -y ./next.deb
systemctl is-active etcdlite etcdlite@m2 etcdlite-backup.timer
test "$(systemctl is-active etcdlite@m3)" = inactive
test "$(value greeting)" = hello
systemctl stop etcdlite@m2
apt-get remove -y etcdlite
apt-get install -y ./next.deb
test "$(systemctl is-active etcdlite@m2)" = inactive

# A removal that is aborted starts it again at once.
cp /var/lib/dpkg/info/etcdlite.prerm prerm
echo 'exit 1' >> /var/lib/dpkg/info/etcdlite.prerm
before=$(systemctl show etcdlite -p MainPID --value)
if apt-get remove -y etcdlite; then exit 1; fi
test "$(systemctl show etcdlite -p MainPID --value)" != "$before"
systemctl is-active etcdlite etcdlite-backup.timer
test "$(systemctl is-active etcdlite@m2)" = inactive
test "$(value greeting)" = hello
cp prerm /var/lib/dpkg/info/etcdlite.prerm

# Remove keeps data and configuration; purge keeps data and says so.
pgrep_etcdlite
apt-get remove -y etcdlite
if pgrep_etcdlite; then exit 1; fi
test -d /var/lib/etcdlite/default.etcdlite
test -e /etc/etcdlite.toml
apt-get purge -y etcdlite > purged
grep -F '/var/lib/etcdlite is not empty and was left' purged
test -d /var/lib/etcdlite/default.etcdlite
test ! -e /etc/etcdlite.toml
if systemctl cat etcdlite; then exit 1; fi
test -z "$(find /etc/systemd /var/lib -maxdepth 3 -name 'etcdlite*.service' -o -name 'etcdlite.running')"

# The data that was left is used again.
apt-get install -y ./etcdlite.deb
test "$(systemctl is-active etcdlite)" = inactive
systemctl start etcdlite
test "$(value greeting)" = hello
apt-get purge -y etcdlite
rm -r /var/lib/etcdlite /var/backups/etcdlite /etc/etcdlite
echo PASSED
