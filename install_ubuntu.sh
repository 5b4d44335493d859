#!/usr/bin/env bash
# Installs ZeroSecretRoom as a service on Ubuntu 16.04 to 26.04 and Debian 11 to 13, or brings it up to date:
#   curl -fsSL https://raw.githubusercontent.com/ericgu2017/0secretroom/master/install_ubuntu.sh | sudo bash
# Options and ZSR_ variables: --help. What it does, in order: main, at the end. Before the last line nothing runs.

describe_distribution() {
  SCRIPT=install_ubuntu.sh
  SYSTEMS='Ubuntu 16.04 to 26.04 and Debian 11 to 13'
  SIBLING='install_centos7.sh on CentOS, RHEL, Rocky and Alma'
}

is_right_distribution() { have apt-get; }

# install_packages NAME...: what of these cannot be had is told by apt-get, and by its exit code
install_packages() {
  local apt='apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0'
  export DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a
  [ -e "$TMP/updated" ] || $apt update || warn "the lists of packages could not be brought up to date"
  : >"$TMP/updated"
  $apt install -y --no-install-recommends "$@" >"$TMP/packages.log" 2>&1 || {
    tail -n 3 "$TMP/packages.log" >&2
    return 1
  }
}

# install_system_python: where the system's own is new enough but came without venv, or there is none at all
install_system_python() {
  ! have python3 || new_enough python3 || return 0
  install_packages python3 python3-venv ca-certificates || true
}

# ── from here to the end both installers are the same ───────────────────────────────────────────────────────────────

set_defaults() {
  set -euo pipefail
  umask 022
  export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  APP=zerosecretroom VERSION=1.0.0
  BASE=${ZSR_BASE:-https://raw.githubusercontent.com/ericgu2017/0secretroom/master}
  SHA256_PROGRAM=438d8eb57b074c6939e786409f805c3b5a5d80da8201d709812c4c30e0fb7f59
  SHA256_PAGE=333dce0337352beb381f935cf6bc823dcf1a22d7067d51dd5f759b43d8c34cf4
  REQUIREMENTS=('websockets>=15,<18' 'cryptography>=46')
  CERTBOT='certbot>=5.4,<6'
  PREFIX=/opt/zerosecretroom STATE=/var/lib/zerosecretroom ACME_STATE=/var/lib/zerosecretroom-acme
  SETTINGS=/etc/zerosecretroom.env TLS=/etc/zerosecretroom UNITS=/etc/systemd/system
  ACTION=install ACME=${ZSR_ACME:-0} DOMAIN=${ZSR_DOMAIN:-}
  TMP='' PYTHON='' RELEASE='' PREVIOUS='' SWITCHED='' SETTINGS_BEFORE='' SOURCE='' REASON=''
  describe_distribution
}

say() { printf '==> %s\n' "$*"; }

warn() { printf 'warning: %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────

read_arguments() {
  while [ $# -gt 0 ]; do
    case $1 in
      --help | --version | --dry-run | --uninstall) ACTION=${1#--} ;;
      --acme) ACME=1 ;;
      --domain)
        [ $# -ge 2 ] || usage_error '--domain needs a name, such as --domain chat.example.org'
        DOMAIN=$2
        shift
        ;;
      --domain=*) DOMAIN=${1#*=} ;;
      *) usage_error "unknown option $1" ;;
    esac
    shift
  done
  case $DOMAIN in *[!A-Za-z0-9.:-]*) usage_error "'$DOMAIN' is no host name or address: leave out https://" ;; esac
  case $ACME in 0 | 1) ;; *) usage_error "ZSR_ACME is '$ACME': 1 or 0" ;; esac
}

usage_error() {
  printf 'error: %s (--help lists the options)\n' "$*" >&2
  exit 2
}

show_help() {
  cat <<HELP
$SCRIPT: installs ZeroSecretRoom $VERSION on $SYSTEMS, or upgrades it.

  --dry-run        say what would be done, and do nothing
  --domain NAME    the host name (or address) people will use
  --acme           a trusted certificate from Let's Encrypt, for --domain or for this machine's public address
  --uninstall      remove it; keys and settings stay, unless ZSR_PURGE=1
  --version        the version and the SHA-256 of both files that this script installs
  --help           this text

Variables, given as in: curl -fsSL .../$SCRIPT | sudo ZSR_PORT=8443 bash
  ZSR_PORT         port for everything (443)
  ZSR_NAME         names and addresses people use, separated by commas (the public addresses of this machine)
  ZSR_MAX_MEMORY   memory for all rooms (half of this machine's, at most 1G)
  ZSR_BASE         where both files come from, unless they lie beside this script
  ZSR_OWN_FILES    1: the files beside this script are installed although they are not the pinned ones
  ZSR_ACME         1: as --acme                 ZSR_DOMAIN  as --domain
  ZSR_ACME_SERVER  another ACME directory than Let's Encrypt's
  ZSR_PYTHON       the Python to use, 3.10 or newer
  ZSR_PYTHON_URL, ZSR_PYTHON_SHA256   another standalone Python (.tar.gz) for systems without one that suffices

Settings that stay: $SETTINGS. Exit code 0: it runs; 1: it does not, or still as before; 2: a wrong option;
3: it runs, but there is no trusted certificate.
HELP
}

show_version() {
  printf '%s %s\n  zerosecretroom.py  %s\n  index.html         %s\n' \
    "$SCRIPT" "$VERSION" "$SHA256_PROGRAM" "$SHA256_PAGE"
}

show_plan() {
  local python='a standalone Python, checked by its SHA-256'
  ! choose_python || python="$PYTHON ($("$PYTHON" -V 2>&1))"
  find_source
  cat <<PLAN
would install ZeroSecretRoom $VERSION; nothing was changed
  files        zerosecretroom.py and index.html from $SOURCE
  python       $python, with ${REQUIREMENTS[*]}
  program      $PREFIX, as the user $APP
  keys         $STATE
  settings     $SETTINGS
  listens on   port $PORT$(is_listening_on "$PORT" && ! is_ours "$PORT" && echo ' (taken: set ZSR_PORT)')
  certificate  $([ "$ACME" = 1 ] && echo "trusted, for ${DOMAIN:-the public address}" || echo 'of its own')
PLAN
}

# ── this machine ─────────────────────────────────────────────────────────────────────────────────────────────────────

check_distribution() {
  is_right_distribution || die "this is not $SYSTEMS: use $SIBLING"
}

check_root() {
  [ "$(id -u)" = 0 ] || die "needs root: curl -fsSL $BASE/$SCRIPT | sudo bash"
}

check_machine() {
  local free
  [ -d /run/systemd/system ] || die "systemd does not run here, see README on how to run it without"
  case $(uname -m) in x86_64 | aarch64) ;; *) die "no ready packages for $(uname -m): x86_64 and aarch64 only" ;; esac
  free=$(df -Pk "$(dirname "$PREFIX")" | awk 'NR == 2 { print $4 }')
  [ "$free" -ge 409600 ] || die "needs 400 MB of disk under $PREFIX, there are $((free / 1024)): make room first"
  is_ours "$PORT" || ! is_listening_on "$PORT" ||
    die "port $PORT is taken by another program: stop that one, or choose another port, such as ZSR_PORT=8443"
}

begin_work() {
  exec 9>/run/zerosecretroom-install.lock
  flock -n 9 || die "another installation is under way: wait for its end"
  TMP=$(mktemp -d)
  trap finish EXIT
  trap 'exit 130' INT TERM HUP
}

# is_listening_on PORT: whether any program does, as the kernel lists it
is_listening_on() { grep -qsi ":$(printf %04X "$1") [0-9A-F:]* 0A " /proc/net/tcp /proc/net/tcp6; }

# is_ours PORT: whether it is the service's own socket that listens
is_ours() {
  grep -qsx "ListenStream=$1" "$UNITS/$APP.socket" && systemctl -q is-active "$APP.socket"
}

memory_kib() { awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo; }

systemd_version() { systemctl --version | awk 'NR == 1 { print $2 }'; }

# is_private ADDRESS: whether it means something else, or nothing, outside of its own network
is_private() {
  case $1 in
    10.* | 127.* | 192.168.* | 169.254.* | 172.1[6-9].* | 172.2?.* | 172.3[01].*) return 0 ;;
    100.6[4-9].* | 100.[7-9]?.* | 100.1[01]?.* | 100.12[0-7].* | ::1 | fe80:* | f[cd]??:*) return 0 ;;
  esac
  return 1
}

# own_addresses public|private: those of this machine, separated by commas. Behind NAT the public one is not among them,
# and then none is called public: a name list that lacks the one that people use would keep them all out.
own_addresses() {
  local each public='' private=''
  for each in $(hostname -I 2>/dev/null); do
    if is_private "$each"; then private+=,$each; else public+=,$each; fi
  done
  case $private in *.*) case $public in *.*) ;; *) private=$public$private public='' ;; esac ;; esac
  if [ "$1" = public ]; then printf '%s' "${public#,}"; else printf '%s' "${private#,}"; fi
}

# ── settings: NAME=value a line, read by systemd for the relay and by this script ────────────────────────────────────

read_settings() {
  local each others=''
  PORT=${ZSR_PORT:-$(setting ZSR_PORT)}
  PORT=${PORT:-443}
  case $PORT in *[!0-9]* | 0* | ??????*) usage_error "ZSR_PORT is '$PORT': a number from 1 to 65535" ;; esac
  NAMES=${ZSR_NAME:-$(setting ZSR_NAME)}
  NAMES=${NAMES:-$(own_addresses public)}
  for each in ${NAMES//,/ }; do
    [ "$each" = "$DOMAIN" ] || others+=,$each
  done
  NAMES=$DOMAIN$others
  NAMES=${NAMES#,}
}

# setting NAME: its value in the file, empty where it is not set
setting() {
  [ ! -f "$SETTINGS" ] || sed -n "s/^$1=//p" "$SETTINGS" | tail -n 1 | tr -d '"'\'
}

# keep_setting NAME VALUE: puts it in the place where the file has it, set or as a comment; an empty one goes out
keep_setting() {
  local line="$1=$2"
  [ -n "$2" ] || line="#$1="
  awk -v name="$1" -v line="$line" '
    !done && ($0 ~ "^" name "=" || $0 ~ "^#" name "=") { print line; done = 1; next }
    $0 !~ "^" name "=" { print }
    END { if (!done) print line }' "$SETTINGS" >"$SETTINGS.new"
  chmod 0644 "$SETTINGS.new"
  mv -f "$SETTINGS.new" "$SETTINGS"
}

write_settings() {
  local half name
  SETTINGS_BEFORE=$TMP/settings
  if [ -f "$SETTINGS" ]; then
    cp -p "$SETTINGS" "$SETTINGS_BEFORE"
  else
    print_settings >"$SETTINGS"
    half=$(($(memory_kib) / 2048))
    keep_setting ZSR_MAX_MEMORY "$((half < 1024 ? half : 1024))M"
  fi
  keep_setting ZSR_PORT "$PORT"
  keep_setting ZSR_NAME "$NAMES"
  for name in ZSR_MAX_MEMORY ZSR_MAX_ROOM_MEMORY ZSR_MAX_FILE ZSR_TTL ZSR_LOG_LEVEL; do
    [ -z "${!name:-}" ] || keep_setting "$name" "${!name}"
  done
}

print_settings() {
  cat <<'SETTINGS'
# Settings of ZeroSecretRoom. After a change: sudo systemctl restart zerosecretroom
# After a change of the port: run the installer again, which also opens it in an active firewall.
#ZSR_PORT=

# Names and addresses people use, separated by commas. Logins under any other are refused; empty takes all.
#ZSR_NAME=

# Memory for all rooms and for one, largest file, how long the relay keeps what an absent member has not fetched
#ZSR_MAX_MEMORY=
#ZSR_MAX_ROOM_MEMORY=256M
#ZSR_MAX_FILE=64M
#ZSR_TTL=72h

# A trusted certificate (PEM chain and key, readable for the group zerosecretroom); both or neither
#ZSR_CERT=
#ZSR_KEY=

# 1 makes a CA of the relay's own instead, for phones that refuse a self-signed certificate: see /trust
#ZSR_LOCAL_CA=0

# A proxy in front, whose X-Forwarded-For counts, and who may read /metrics and /healthz beside this machine: addresses
# or networks, separated by commas
#ZSR_TRUSTED_PROXY=
#ZSR_MONITOR=

# auto takes uvloop if the relay's Python has it, asyncio otherwise
#ZSR_LOOP=auto

# Any other number of the room Limits in zerosecretroom.py: NAME=VALUE, separated by commas, such as connections=5000
#ZSR_LIMIT=

# debug, info, warning or error; no level logs text, names or keys. 1 logs lines as JSON, or where those who are turned
# away come from
#ZSR_LOG_LEVEL=info
#ZSR_LOG_JSON=0
#ZSR_LOG_ADDRESSES=0

# 1 lets a page opened from disk connect
#ZSR_ALLOW_NULL_ORIGIN=0
SETTINGS
}

# ── the two files ────────────────────────────────────────────────────────────────────────────────────────────────────

# find_source: SOURCE is the folder of this script if both files lie beside it, else BASE
find_source() {
  local script=${BASH_SOURCE[0]:-} folder
  SOURCE=$BASE
  [ -f "$script" ] || return 0
  folder=$(cd "$(dirname "$script")" && pwd)
  if [ -f "$folder/zerosecretroom.py" ] && [ -f "$folder/index.html" ]; then SOURCE=$folder; fi
}

get_files() {
  find_source
  say "zerosecretroom.py and index.html from $SOURCE"
  get_file zerosecretroom.py "$SHA256_PROGRAM"
  get_file index.html "$SHA256_PAGE"
}

# get_file NAME SHA256: into TMP, or the end of it all
get_file() {
  case $SOURCE in
    /*)
      cp "$SOURCE/$1" "$TMP/$1"
      [ "${ZSR_OWN_FILES:-0}" != 1 ] || return 0
      has_sha256 "$TMP/$1" "$2" || die "$SOURCE/$1 is not the one $SCRIPT knows: ZSR_OWN_FILES=1 installs it anyway"
      ;;
    *)
      download "$SOURCE/$1" "$TMP/$1"
      has_sha256 "$TMP/$1" "$2" || die "$1 from $SOURCE has another SHA-256 than $SCRIPT expects: fetch that anew"
      ;;
  esac
}

# download URL FILE: over https only; plain http is for tests, on this machine
download() {
  local protocol
  case $1 in
    https://*) protocol='=https' ;;
    http://127.0.0.1[:/]*) protocol='=http' ;;
    *) die "$1 is not an https address: see ZSR_BASE" ;;
  esac
  curl -fsSL --proto "$protocol" --proto-redir '=https' --retry 2 --connect-timeout 15 --max-time 600 -o "$2" "$1" ||
    die "$1 cannot be downloaded: is this machine online, and the address right?"
}

has_sha256() { [ "$(sha256sum "$1" | cut -d ' ' -f 1)" = "$2" ]; }

# ── Python ───────────────────────────────────────────────────────────────────────────────────────────────────────────

get_curl() {
  have curl || install_packages curl ca-certificates || die "curl is missing and cannot be installed: do that by hand"
}

get_python() {
  choose_python || {
    say "installing Python"
    install_system_python
    choose_python || get_standalone_python
  }
}

# choose_python: PYTHON is the one asked for, or the first on this system that suffices
choose_python() {
  local each
  if [ -n "${ZSR_PYTHON:-}" ]; then
    suffices "$ZSR_PYTHON" || die "ZSR_PYTHON=$ZSR_PYTHON is no Python 3.10 or newer with venv"
    PYTHON=$ZSR_PYTHON
    return
  fi
  for each in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    PYTHON=$(command -v "$each") && suffices "$PYTHON" && return
  done
  PYTHON=''
  return 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

suffices() { new_enough "$1" && "$1" -c 'import ensurepip, ssl, venv' >/dev/null 2>&1; }

# get_standalone_python: one that needs nothing of the system but glibc 2.17. The sums are those of the builds' makers.
get_standalone_python() {
  local builds=https://github.com/astral-sh/python-build-standalone/releases/download url sha256 folder
  url=$builds/20260929/cpython-3.12.14%2B20260929-$(uname -m)-unknown-linux-gnu-install_only_stripped.tar.gz
  case $(uname -m) in
    x86_64) sha256=ef605200f8174e87ecfc308e52a88127543f85dd5c940dc5e92cab244b98a003 ;;
    *) sha256=706111f834ae1557314f48b7293ddc72cc96e952aa75c5d31f56c2b7ddeac3d3 ;;
  esac
  if [ -n "${ZSR_PYTHON_URL:-}" ]; then
    url=$ZSR_PYTHON_URL
    sha256=${ZSR_PYTHON_SHA256:-}
    [ ${#sha256} = 64 ] || die "set ZSR_PYTHON_SHA256 to the SHA-256 of $url: nothing unchecked is installed"
  fi
  folder=$PREFIX/python/${sha256:0:12}
  PYTHON=$folder/bin/python3
  [ ! -x "$PYTHON" ] || return 0
  say "no Python 3.10 or newer here: fetching a standalone one"
  download "$url" "$TMP/python.tar.gz"
  has_sha256 "$TMP/python.tar.gz" "$sha256" || die "$url has another SHA-256 than expected: nothing was installed"
  rm -rf "$folder.new"
  mkdir -p "$folder.new"
  tar -xzf "$TMP/python.tar.gz" -C "$folder.new" --strip-components=1 --no-same-owner
  rm -f "$TMP/python.tar.gz"
  mv -T "$folder.new" "$folder"
  suffices "$PYTHON" || die "the Python of $url does not run here"
}

# get_pip: one for all virtual environments, since making it takes longer than all the rest of a release
get_pip() {
  "$PREFIX/pip/bin/python" -c 'import pip' 2>/dev/null || "$PYTHON" -m venv --clear "$PREFIX/pip" ||
    die "$PYTHON cannot make a virtual environment in $PREFIX/pip"
  run_pip install --only-binary=:all: 'pip>=22.3' || die "pip cannot be brought up to date; is the package index within reach?"
}

run_pip() { "$PREFIX/pip/bin/python" -m pip --quiet --disable-pip-version-check --no-input --no-cache-dir "$@"; }

# make_venv FOLDER REQUIREMENT...: nothing is compiled and no package runs code of its own while it is installed
make_venv() {
  local folder=$1
  shift
  "$folder/bin/python" -c '' 2>/dev/null || "$PYTHON" -m venv --without-pip --clear "$folder" ||
    die "$PYTHON cannot make a virtual environment in $folder"
  run_pip --python "$folder/bin/python" install --only-binary=:all: --upgrade "$@" ||
    die "Python packages cannot be installed: $*; is the package index within reach?"
}

# ── releases: each in a folder of its own, `current` points to the one that runs ─────────────────────────────────────

make_user() {
  id "$APP" >/dev/null 2>&1 || useradd --system --user-group --no-create-home --home-dir "$STATE" \
    --shell "$(command -v nologin || echo /bin/false)" "$APP"
  install -d -m 0700 "$STATE"
  chown -hR "$APP:" "$STATE"
}

build_release() {
  [ ! -L "$PREFIX/current" ] || PREVIOUS=$(readlink -f "$PREFIX/current")
  RELEASE=$PREFIX/releases/$(date -u +%Y%m%dT%H%M%SZ)-$(sha256sum "$TMP/zerosecretroom.py" "$TMP/index.html" |
    sha256sum | cut -c 1-8)
  say "building ${RELEASE##*/} with $("$PYTHON" -V 2>&1)"
  mkdir -p "$RELEASE/units"
  make_venv "$RELEASE/venv" "${REQUIREMENTS[@]}"
  install -m 0644 "$TMP/zerosecretroom.py" "$TMP/index.html" "$RELEASE"
  print_socket >"$RELEASE/units/$APP.socket"
  print_service >"$RELEASE/units/$APP.service"
  ! have restorecon || restorecon -R "$PREFIX" >/dev/null 2>&1 || true
}

switch_to_release() {
  say "starting it"
  SWITCHED=1
  activate "$RELEASE" || {
    journalctl -u "$APP" -n 12 --no-pager -o cat >&2 || true
    die "the new release does not start; its last words stand above"
  }
  SWITCHED=''
}

# activate RELEASE: makes it the one that runs, and asks it whether it does. A socket that stays as it was goes on
# listening meanwhile, so that whoever connects waits and is not refused.
activate() {
  local listening=''
  ! cmp -s "$1/units/$APP.socket" "$UNITS/$APP.socket" || ! systemctl -q is-active "$APP.socket" || listening=1
  cp "$1/units/$APP.socket" "$1/units/$APP.service" "$UNITS" &&
    ln -sfn "$1" "$PREFIX/current.new" &&
    mv -T "$PREFIX/current.new" "$PREFIX/current" &&
    systemctl daemon-reload &&
    systemctl -q enable "$APP.socket" "$APP.service" 2>/dev/null || return 1
  [ -n "$listening" ] || systemctl -q stop "$APP.service" "$APP.socket" 2>/dev/null
  systemctl start "$APP.socket" && systemctl restart "$APP.service" 2>/dev/null && is_healthy
}

is_healthy() {
  [ "$(curl -ksS --noproxy '*' --retry 3 --max-time 10 "https://127.0.0.1:$PORT/healthz" 2>&1)" = ok ]
}

# finish: whatever ended the work, nothing half done stays
finish() {
  local status=$?
  trap - EXIT
  [ -z "$SWITCHED" ] || roll_back || true
  [ -z "$RELEASE" ] || [ "$(readlink -f "$PREFIX/current")" = "$RELEASE" ] || rm -rf "$RELEASE"
  rm -rf "$TMP"
  exit "$status"
}

roll_back() {
  if [ -f "$SETTINGS_BEFORE" ]; then cp -p "$SETTINGS_BEFORE" "$SETTINGS"; else rm -f "$SETTINGS"; fi
  if [ -z "$PREVIOUS" ]; then
    remove_service
    rm -f "$PREFIX/current"
    warn "this was the first release, so the service is gone again"
    return
  fi
  PORT=$(sed -n 's/^ListenStream=//p' "$PREVIOUS/units/$APP.socket")
  if activate "$PREVIOUS"; then
    warn "back to the release before, ${PREVIOUS##*/}, which runs"
  else
    warn "the release before, ${PREVIOUS##*/}, does not start either: journalctl -u $APP -n 50"
  fi
}

# drop_old_releases: this one and the one before stay, and the standalone Pythons that one of them uses
drop_old_releases() {
  local each
  for each in "$PREFIX"/releases/*; do
    [ "$each" = "$RELEASE" ] || [ "$each" = "$PREVIOUS" ] || rm -rf "$each"
  done
  for each in "$PREFIX"/python/*; do
    grep -qs "^home = $each/" "$PREFIX"/*/pyvenv.cfg "$PREFIX"/releases/*/venv/pyvenv.cfg || rm -rf "$each"
  done
}

# ── units ────────────────────────────────────────────────────────────────────────────────────────────────────────────

print_socket() {
  cat <<UNIT
[Unit]
Description=ZeroSecretRoom, port $PORT

[Socket]
ListenStream=$PORT
Backlog=512
KeepAlive=true

[Install]
WantedBy=sockets.target
UNIT
}

print_service() {
  cat <<UNIT
[Unit]
Description=ZeroSecretRoom, relay of end-to-end encrypted rooms
Documentation=https://github.com/ericgu2017/0secretroom
Requires=$APP.socket
After=network.target $APP.socket

[Service]
Type=notify
User=$APP
Group=$APP
EnvironmentFile=-$SETTINGS
ExecStart=$PREFIX/current/venv/bin/python -IB $PREFIX/current/zerosecretroom.py
ExecReload=/bin/sh -c 'kill -HUP \$MAINPID'
Restart=always
RestartSec=2
TimeoutStartSec=60
TimeoutStopSec=15
SyslogIdentifier=$APP
UMask=0077
LimitNOFILE=65536
LimitCORE=0
OOMScoreAdjust=200
NoNewPrivileges=true
CapabilityBoundingSet=
PrivateTmp=true
PrivateDevices=true
# the socket is passed in, so the relay needs no network of its own
PrivateNetwork=true
RestrictAddressFamilies=AF_UNIX
SystemCallArchitectures=native
UNIT
  if [ "$(systemd_version)" -ge 240 ]; then print_sandbox; else print_old_sandbox; fi
  printf '\n[Install]\nWantedBy=multi-user.target\n'
}

# print_sandbox: for systemd 240 and newer
print_sandbox() {
  cat <<UNIT
StateDirectory=$APP
StateDirectoryMode=0700
MemoryMax=$(($(memory_kib) * 3 / 4))K
TasksMax=64
ProtectSystem=strict
ProtectHome=true
ProtectHostname=true
ProtectClock=true
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectKernelLogs=true
ProtectControlGroups=true
ProtectProc=invisible
ProcSubset=pid
PrivateUsers=true
PrivateIPC=true
PrivateMounts=true
DevicePolicy=closed
RestrictNamespaces=true
RestrictRealtime=true
RestrictSUIDSGID=true
LockPersonality=true
MemoryDenyWriteExecute=true
RemoveIPC=true
KeyringMode=private
AmbientCapabilities=
IPAddressDeny=any
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
UNIT
}

# print_old_sandbox: what systemd 219 knows; later ones still take it
print_old_sandbox() {
  cat <<UNIT
Environment=ZSR_STATE_DIR=$STATE
MemoryLimit=$(($(memory_kib) * 3 / 4))K
ProtectSystem=full
ProtectHome=true
ReadOnlyDirectories=/var
ReadWriteDirectories=$STATE
InaccessibleDirectories=/boot /media /mnt
SystemCallFilter=~add_key bpf chroot delete_module finit_module init_module kexec_load keyctl mount perf_event_open
SystemCallFilter=~personality pivot_root process_vm_readv process_vm_writev ptrace reboot request_key setns swapoff
SystemCallFilter=~swapon umount2 unshare
SystemCallErrorNumber=EPERM
UNIT
}

# ── firewall: opened where one is active; what was opened is written down, so that uninstalling can close it ─────────

open_firewall() {
  local port
  for port in "$@"; do
    grep -qsx "$port" "$PREFIX/opened" && continue
    if firewall_allows "$port" && printf '%s\n' "$port" >>"$PREFIX/opened"; then
      say "firewall: port $port opened"
    fi
  done
}

# grep reads to the end: under pipefail one that stops early (-q) fails the pipe for who still writes
has_ufw() { have ufw && ufw status 2>/dev/null | grep '^Status: active' >/dev/null; }

has_firewalld() { have firewall-cmd && firewall-cmd -q --state 2>/dev/null; }

# firewall_allows PORT: opens it; fails where there is nothing to open
firewall_allows() {
  if has_ufw; then
    ! ufw status | grep "^$1/tcp  *ALLOW" >/dev/null && ufw allow "$1/tcp" >/dev/null
  elif has_firewalld; then
    ! firewall-cmd -q --query-port="$1/tcp" &&
      firewall-cmd -q --permanent --add-port="$1/tcp" && firewall-cmd -q --add-port="$1/tcp"
  else
    return 1
  fi
}

close_firewall() {
  local port
  [ -f "$PREFIX/opened" ] || return 0
  while read -r port; do
    if has_ufw; then
      ufw delete allow "$port/tcp" >/dev/null
    elif has_firewalld; then
      firewall-cmd -q --permanent --remove-port="$port/tcp" && firewall-cmd -q --remove-port="$port/tcp"
    fi
  done <"$PREFIX/opened"
}

# ── a trusted certificate ────────────────────────────────────────────────────────────────────────────────────────────

# get_trusted_certificate: where it fails, the relay goes on with the certificate that it had, and REASON says why
get_trusted_certificate() {
  local subject
  [ "$ACME" = 1 ] || {
    mend_certbot
    return 0
  }
  subject=${NAMES%%,*}
  if [ -z "$subject" ]; then
    REASON='this machine has no public address of its own: give the name that people use with --domain'
    return
  fi
  say "asking for a certificate for $subject"
  open_firewall 80
  if ! (install_certbot); then
    REASON='certbot cannot be installed, see above'
  elif ! ask_for_certificate "$subject"; then
    REASON=$(why_certbot_failed)
  elif ! use_certificate; then
    REASON="the relay does not take it: journalctl -u $APP"
  fi
}

# mend_certbot: a newer system may have taken away the Python that certbot was installed with, and renewals would end
mend_certbot() {
  [ -d "$PREFIX/acme" ] || return 0
  "$PREFIX/acme/bin/python" -c '' 2>/dev/null || (install_certbot) || REASON='certbot cannot be installed, see above'
}

install_certbot() {
  make_venv "$PREFIX/acme" "$CERTBOT"
  install -d -m 0700 "$ACME_STATE" && install -d -m 0750 -g "$APP" "$TLS" &&
    print_certbot >"$PREFIX/acme/certbot" && print_deploy_hook >"$PREFIX/acme/deploy" &&
    chmod 0755 "$PREFIX/acme/certbot" "$PREFIX/acme/deploy"
}

print_certbot() {
  cat <<HOOK
#!/bin/sh
# certbot, with folders of its own beside any other that is installed here
exec $PREFIX/acme/bin/certbot "\$@" --config-dir $ACME_STATE --work-dir $ACME_STATE/work --logs-dir $ACME_STATE/log
HOOK
}

print_deploy_hook() {
  cat <<HOOK
#!/bin/sh
# Called by certbot with RENEWED_LINEAGE: puts chain and key where the relay reads them, and has it read them.
set -e
umask 077
for name in fullchain privkey; do
  install -m 0640 -g $APP "\$RENEWED_LINEAGE/\$name.pem" "$TLS/\$name.new"
done
mv -f "$TLS/privkey.new" "$TLS/privkey.pem"
mv -f "$TLS/fullchain.new" "$TLS/fullchain.pem"
systemctl reload $APP.service
HOOK
}

# ask_for_certificate SUBJECT: by an answer on port 80; an address gets one of a week, which is renewed every few days
ask_for_certificate() {
  local subject=(--domain "$1")
  ! is_address "$1" || subject=(--ip-address "$1" --preferred-profile shortlived)
  [ -z "${ZSR_ACME_SERVER:-}" ] || subject+=(--server "$ZSR_ACME_SERVER")
  "$PREFIX/acme/certbot" certonly --standalone --non-interactive --agree-tos --register-unsafely-without-email \
    --keep-until-expiring --cert-name "$APP" --deploy-hook "$PREFIX/acme/deploy" "${subject[@]}" \
    >"$TMP/certbot.log" 2>&1
}

is_address() {
  case $1 in
    *:*) return 0 ;;
    *[!0-9.]*) return 1 ;;
  esac
}

# why_certbot_failed: its last words in one line, without its advice
why_certbot_failed() {
  grep -v -e '^Saving debug log' -e '^Ask for help' -e '^- -' -e '^$' "$TMP/certbot.log" | tail -n 8 | tr -s ' \n' ' '
}

use_certificate() {
  RENEWED_LINEAGE=$ACME_STATE/live/$APP "$PREFIX/acme/deploy" >/dev/null 2>&1 || return 1
  keep_setting ZSR_CERT "$TLS/fullchain.pem"
  keep_setting ZSR_KEY "$TLS/privkey.pem"
  if ! systemctl restart "$APP.service" || ! is_healthy; then
    forget_certificate
    systemctl restart "$APP.service"
    return 1
  fi
  print_renewal >"$UNITS/$APP-acme.service"
  print_renewal_timer >"$UNITS/$APP-acme.timer"
  systemctl daemon-reload && systemctl -q enable "$APP-acme.timer" 2>/dev/null && systemctl start "$APP-acme.timer"
}

forget_certificate() {
  [ "$(setting ZSR_CERT)" = "$TLS/fullchain.pem" ] || return 0
  keep_setting ZSR_CERT ''
  keep_setting ZSR_KEY ''
}

print_renewal() {
  cat <<UNIT
[Unit]
Description=ZeroSecretRoom, renewal of the trusted certificate
After=network-online.target
Wants=network-online.target

[Service]
Type=oneshot
ExecStart=$PREFIX/acme/certbot renew --quiet --no-random-sleep-on-renew
PrivateTmp=true
PrivateDevices=true
ProtectHome=true
NoNewPrivileges=true
UNIT
}

print_renewal_timer() {
  cat <<UNIT
[Unit]
Description=ZeroSecretRoom, looks every few hours whether the trusted certificate is due

[Timer]
OnBootSec=15min
OnActiveSec=6h
OnUnitActiveSec=6h
RandomizedDelaySec=1h

[Install]
WantedBy=timers.target
UNIT
}

# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────

summarize() {
  local name addresses=() suffix=''
  [ "$PORT" = 443 ] || suffix=:$PORT
  for name in ${NAMES//,/ } $([ -n "$NAMES" ] || own_addresses private | tr , ' '); do
    case $name in *:*) name="[$name]" ;; esac
    addresses+=("https://$name$suffix/")
  done
  [ ${#addresses[@]} -gt 0 ] || addresses=("https://localhost$suffix/")
  say "ZeroSecretRoom $VERSION runs"
  printf '  open         %s\n' "${addresses[@]}"
  printf '  certificate  SHA-256 %s\n' "$(certificate_fingerprint)"
  [ -n "$(setting ZSR_CERT)" ] || printf '               its own: browsers warn once, compare this before you go on\n'
  printf '  page         SHA-256 %s\n' "$(sha256sum "$RELEASE/index.html" | cut -d ' ' -f 1)"
  if [ -n "$NAMES" ]; then
    printf '  names        only these are answered; others: ZSR_NAME in %s\n' "$SETTINGS"
  else
    printf '  names        behind a router or NAT, put the public address into ZSR_NAME in %s\n' "$SETTINGS"
  fi
  printf '  log          journalctl -u %s\n' "$APP"
  show_qr_code "${addresses[0]}"
  [ -z "$REASON" ] || {
    warn "no trusted certificate, it goes on with the one it had: $REASON"
    exit 3
  }
}

certificate_fingerprint() {
  "$RELEASE/venv/bin/python" -I - "$PORT" <<'PYTHON'
import hashlib, ssl, sys
pem = ssl.get_server_certificate(("127.0.0.1", int(sys.argv[1])))
digits = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest().upper()
print(":".join(digits[at : at + 2] for at in range(0, 64, 2)))
PYTHON
}

show_qr_code() {
  have qrencode || install_packages qrencode 2>/dev/null || {
    printf '  QR code      not shown: there is no package qrencode\n'
    return
  }
  qrencode -t ANSIUTF8 -m 2 "$1"
}

remove_service() {
  local unit
  for unit in "$APP.socket" "$APP.service" "$APP-acme.timer"; do # newer systemctl does nothing at all if one is not there
    systemctl disable --now "$unit" >/dev/null 2>&1 || true
  done
  rm -f "$UNITS/$APP".{socket,service} "$UNITS/$APP-acme".{service,timer}
  systemctl daemon-reload
  systemctl reset-failed "$APP.socket" "$APP.service" >/dev/null 2>&1 || true
}

uninstall() {
  remove_service
  close_firewall
  rm -rf "$PREFIX"
  if [ "${ZSR_PURGE:-0}" = 1 ]; then
    rm -rf "$STATE" "$ACME_STATE" "$TLS" "$SETTINGS"
    ! id "$APP" >/dev/null 2>&1 || userdel "$APP"
    say "ZeroSecretRoom, its keys and its settings are gone"
  else
    forget_certificate # nobody renews it any more
    say "ZeroSecretRoom is gone; its keys ($STATE) and settings ($SETTINGS) stay, ZSR_PURGE=1 removes them too"
  fi
}

main() {
  set_defaults
  read_arguments "$@"
  case $ACTION in
    help | version)
      "show_$ACTION"
      return
      ;;
  esac
  check_distribution
  read_settings
  case $ACTION in
    dry-run)
      show_plan
      return
      ;;
  esac
  check_root
  begin_work
  case $ACTION in
    uninstall)
      uninstall
      return
      ;;
  esac
  check_machine
  get_curl
  get_files
  get_python
  get_pip
  make_user
  build_release
  write_settings
  switch_to_release
  open_firewall "$PORT"
  get_trusted_certificate
  drop_old_releases
  summarize
}

{ main "$@" </dev/null; }
