# Sourced by the build.sh of tests whose programs are written in Go.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# build RELEASE PACKAGES IS_INSTALLED FILE...: run the commands of standard input. They find the folder
# with the files in $own and an empty one in $work, and leave what they make in $made, from where it is
# copied to $out. They run here if the command IS_INSTALLED succeeds. Otherwise this release of Debian
# with these packages is installed for them into a temporary folder.
build() {
    local release=$1 packages=$2 is_installed=$3
    shift 3
    {
        cat <<'END'
set -e
own=$1 work=$2 made=$2/made
mkdir -p "$made"
export HOME=$work GO111MODULE=off GOPATH=$work/go:/usr/share/gocode CGO_ENABLED=0
export GOROOT=${GOROOT:-/usr/lib/go} GOCACHE=${GOCACHE:-$work/cache}
END
        cat
    } > "$work/build"
    if eval "$is_installed" > /dev/null 2>&1; then
        bash "$work/build" "$here" "$work"
        cp -r "$work"/made/* "$out"
    else
        mmdebstrap --quiet --variant=apt --format=null --include="ca-certificates,golang-go,$packages" \
            --aptopt='Acquire::Check-Valid-Until "false"' \
            --customize-hook='mkdir -p "$1/work"' \
            --customize-hook="copy-in ${*/#/$here/} $work/build /work" \
            --customize-hook='chroot "$1" bash /work/build /work /work' \
            --customize-hook="sync-out /work/made $out" \
            "$release"
    fi
}
