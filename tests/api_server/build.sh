#!/bin/bash
# The tests of Kubernetes' storage, as programs that start the store that STORE names: build.sh FOLDER
# makes FOLDER/etcd3.test and FOLDER/cacher.test. With Go and golang-k8s-apiserver-dev (0.33 or later)
# installed, it uses them. Otherwise it installs Debian unstable with both into a temporary folder,
# which takes root, mmdebstrap, Debian's packages, 3 GB and ten minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/build" <<'END'
set -e
storage=/usr/share/gocode/src/k8s.io/apiserver/pkg/storage
printf '{"Replace": {"%s": "%s", "%s": "%s"}}' \
    $storage/etcd3/testserver/test_server.go "$1/test_server.go" \
    $storage/etcd3/leader_test.go "$1/leader_test.go" > "$2/overlay.json"
export HOME=$2 GO111MODULE=off GOPATH=$2/go:/usr/share/gocode CGO_ENABLED=0
export GOROOT=${GOROOT:-/usr/lib/go} GOCACHE=${GOCACHE:-$2/cache}
for package in etcd3 cacher; do
    go test -c -vet=off -overlay "$2/overlay.json" -o "$2/$package.test" k8s.io/apiserver/pkg/storage/$package
done
END
if command -v go > /dev/null && [ -d /usr/share/gocode/src/k8s.io/apiserver/pkg/storage/cacher/store ]; then
    bash "$work/build" "$here" "$work"
    cp "$work"/*.test "$out"
else
    packages=ca-certificates,golang-go,golang-k8s-apiserver-dev,golang-github-fxamacker-cbor-dev
    mmdebstrap --quiet --variant=apt --format=null --include=$packages \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --customize-hook='mkdir -p "$1/work"' \
        --customize-hook="copy-in $here/test_server.go $here/leader_test.go $work/build /work" \
        --customize-hook='chroot "$1" bash /work/build /work /work' \
        --customize-hook="copy-out /work/etcd3.test /work/cacher.test $out" \
        unstable
fi
