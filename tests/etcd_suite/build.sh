#!/bin/bash
# etcd's own tests, as programs: build.sh FOLDER makes FOLDER/*.test, with the certificates, etcdctl and
# etcdutl that they use. Those of etcd's tests/integration start the program that STORE names in place
# of servers within their process. With Go and Debian 13's golang-etcd-server-dev, etcd-client and
# etcd-server installed, it uses them. Otherwise it installs Debian 13 with them into a temporary
# folder, which takes root, mmdebstrap, Debian's packages, 2 GB and ten minutes.
. "$(dirname "$0")/../debian_build.sh"
build trixie golang-etcd-server-dev,etcd-client,etcd-server \
    'type go etcdctl etcdutl && [ -d /usr/share/gocode/src/go.etcd.io/etcd/tests ]' \
    cluster.go member.go <<'END'
tests=/usr/share/gocode/src/go.etcd.io/etcd/tests
mkdir -p "$work/edited"
cd $tests
overlay=
replace() { overlay+="${overlay:+, }\"$tests/$1\": \"$2\""; }
# What is only about a server within the tests' process, and the API v2.
for file in v2_http_kv tracing corrupt hashkv grpc; do
    replace integration/${file}_test.go ""
done
# Tests that Debian leaves out are run, except where a file is not installed. Servers are started
# without --enable-v2. A key is written by the API v3 to see that a cluster works, and an address that
# is added is not of a unix socket. A tick is longer, and tests of etcdctl, which may start it fifty
# times, have a minute in place of 15 s. Two tests would leave themselves out: they begin twice.
for file in $(grep -rlE '"Debian-|"--enable-v2"|^func clusterMustProgress|tickDuration|MutexTryLock' \
    e2e integration framework); do
    edited=$work/edited/$(echo "$file" | tr / .)
    sed -e '/t.Skip("Debian-[a-z]/d' -e '/args, "--enable-v2")/d' -e 's,unix://foo:,http://127.0.0.1:,' \
        -e 's/^func clusterMustProgress/func clusterMustProgressV2/' \
        -e 's/\(tickDuration *:\?= \)10/\150/' -e 's/ret.getTestTimeout()/4 * &/' \
        -e '/^func test\(MutexTryLock\|WatchCancelRunning\)/,/^}/{/BeforeTest/d}' "$file" > "$edited"
    replace "$file" "$edited"
done
for file in cluster member; do # The last entry counts.
    replace integration/$file.go "$own/$file.go"
done
echo "{\"Replace\": {$overlay}}" > "$work/overlay.json"
for package in e2e integration integration/clientv3 integration/proxy/grpcproxy \
    integration/clientv3/{concurrency,connectivity,examples,experimental/recipes,lease,naming}; do
    go test -c -vet=off -overlay "$work/overlay.json" -o "$made/${package##*/}.test" ./$package
done
cp -r fixtures integration/fixtures-expired "$(command -v etcdctl)" "$(command -v etcdutl)" "$made"
END
