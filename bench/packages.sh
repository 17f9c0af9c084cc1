#!/bin/bash
# etcdlite beside Debian's etcd-server, each installed on a booted Debian of its own: what is pulled in,
# how large it is, how soon it serves, and what an idle member takes. As root, with mmdebstrap and
# systemd-nspawn; "make deb" first. Prints the rows of a table in docs/performance.md.
#
#   bench/packages.sh [RELEASE [IDLE_SECONDS]]      default: bookworm 60
set -euo pipefail
release=${1:-bookworm} idle_s=${2:-60}
top=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Runs inside, as root, when the system has booted.
cat > "$work/measure" <<'END'
#!/bin/bash
set -eu
service=$1 idle_s=$2
ready() { curl -sf http://127.0.0.1:2379/health >/dev/null; }
systemctl stop "$service"
# Five starts with data, each timed until it serves; the first one makes the data.
for round in 0 1 2 3 4 5; do
    began=$(date +%s%N)
    systemctl start "$service"
    until ready; do sleep 0.01; done
    [ $round = 0 ] || echo "ready_ms $(( ($(date +%s%N) - began) / 1000000 ))"
    [ $round = 5 ] || systemctl stop "$service"
    # Units have a limit on starts in a short time.
    systemctl reset-failed
done
pid=$(systemctl show "$service" -p MainPID --value)
sleep 10
figures() { # CPU time in ticks; how often a thread went to sleep by itself
    read -r -a stat < "/proc/$pid/stat"
    echo $((stat[13] + stat[14])) $(cat /proc/$pid/task/*/status | sed -n 's/^voluntary_ctxt_switches:\t//p' | paste -sd+ | bc)
}
read -r ticks sleeps <<< "$(figures)"
sleep "$idle_s"
read -r ticks_later sleeps_later <<< "$(figures)"
echo "idle_cpu_ms_per_s $(bc <<< "scale=2; ($ticks_later - $ticks) * 1000 / $(getconf CLK_TCK) / $idle_s")"
echo "idle_wakeups_per_s $(bc <<< "scale=1; ($sleeps_later - $sleeps) / $idle_s")"
sed -n 's/^VmRSS:[^0-9]*\([0-9]*\) kB/rss_kib \1/p; s/^RssAnon:[^0-9]*\([0-9]*\) kB/anonymous_kib \1/p' "/proc/$pid/status"
END

for package in etcd-server ./etcdlite.deb; do
    root=$work/${package//[.\/]/}
    mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,dbus,curl,bc \
        --skip=cleanup/apt/lists "$release" "$root"
    cp "$top/dist/etcdlite.deb" "$root/root/"
    cp "$work/measure" "$root/root/"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    printf '127.0.0.1 localhost\n::1 localhost\n' > "$root/etc/hosts"
    service=etcd
    [ "$package" = etcd-server ] || service=etcdlite
    chroot "$root" sh -c "cd /root; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $package" > "$work/log"
    installed=$(chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' | grep -E "^etcd(lite|-server) ")
    echo "== $release: $installed"
    sed -n 's/.* upgraded, \([0-9]*\) newly installed.*/packages \1/p; s/^After this operation, \(.*\) of.*/installed_size \1/p' "$work/log"
    printf '[Unit]\nAfter=multi-user.target\nSuccessAction=poweroff\nFailureAction=poweroff\n[Service]\nType=oneshot\nExecStart=/bin/bash /root/measure %s %s\nStandardOutput=file:/root/figures\nStandardError=file:/root/figures\n' \
        "$service" "$idle_s" > "$root/etc/systemd/system/measure.service"
    systemd-nspawn --quiet --register=no --keep-unit --private-network -D "$root" --boot \
        systemd.wants=measure.service > "$work/boot" 2>&1 || tail -5 "$work/boot"
    cat "$root/root/figures"
done
