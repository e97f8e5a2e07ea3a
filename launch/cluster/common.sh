# shellcheck shell=bash
# What the launchers share: reading flags, printing commands so that a shell reads them back, running them.
#
# A launcher declares `defaults` (flag name to default) and `switches` (names of flags that take no value), defines
# `usage`, and calls `parse_flags "$@"`, which fills `flag` (name to value) and `trainer` (what stands behind --).

if ((BASH_VERSINFO[0] < 4)); then
    echo "${0##*/}: needs bash 4 or newer, this is $BASH_VERSION" >&2
    exit 2
fi

declare -A defaults=() switches=() flag=()
declare -a trainer=()

# Whether a text holds what a terminal obeys: control characters, also those that UTF-8 writes in two bytes.
has_control() {
    local LC_ALL=C
    [[ "$1" == *[[:cntrl:]]* || "$1" == *$'\xc2'[$'\x80'-$'\x9f']* ]]
}

# Ends the script because of how it was called.
fail() {
    local text="$1" LC_ALL=C
    if has_control "$text"; then printf -v text '%q' "$text"; fi
    printf '%s: %s\n' "${0##*/}" "$text" >&2
    exit 2
}

note() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

# One argument as a shell reads it back, in the form of Python's shlex.quote; with control characters in that of bash,
# so that it always is one line.
quote() {
    local LC_ALL=C escape="'\"'\"'"
    if [[ "$1" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
        printf '%s' "$1"
    elif has_control "$1"; then
        printf '%q' "$1"
    else
        printf "'%s'" "${1//\'/"$escape"}"
    fi
}

# A command on one line.
show() {
    local first=1 word
    for word in "$@"; do
        if ((first)); then first=0; else printf ' '; fi
        quote "$word"
    done
    printf '\n'
}

# Runs a command and reports it on standard error; in a dry run prints it on standard output instead.
execute() {
    if [[ "${flag[dry_run]}" == true ]]; then
        show "$@"
    else
        printf '+ ' >&2
        show "$@" >&2
        "$@"
    fi
}

# A remark between the commands of a dry run.
remark() {
    if [[ "${flag[dry_run]}" == true ]]; then printf '# %s\n' "$1"; fi
}

parse_flags() {
    local name value key
    for key in "${!defaults[@]}"; do flag[$key]="${defaults[$key]}"; done
    for key in "${!switches[@]}"; do flag[$key]=false; done
    while (($#)); do
        case "$1" in
            --)
                shift
                trainer=("$@")
                break
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            --?*) ;;
            *) fail "unexpected argument '$1'; the training's own flags stand behind --" ;;
        esac
        name="${1%%=*}"
        name="${name#--}"
        # Bash would expand what else may stand in a subscript.
        [[ "$name" =~ ^[a-z_]+$ ]] || fail "unknown flag --$name; flags are small letters and underscores"
        if [[ -v "switches[$name]" ]]; then
            [[ "$1" != *=* ]] || fail "--$name takes no value, got '$1'"
            flag[$name]=true
        elif [[ -v "defaults[$name]" ]]; then
            if [[ "$1" == *=* ]]; then
                value="${1#*=}"
            else
                (($# > 1)) || fail "--$name lacks its value"
                shift
                value="$1"
            fi
            [[ -n "$value" ]] || fail "--$name is empty"
            if has_control "$value"; then fail "--$name holds a line break or another control character"; fi
            flag[$name]="$value"
        else
            fail "unknown flag --$name; valid: $(printf '%s\n' "${!defaults[@]}" "${!switches[@]}" | sort | sed 's/^/--/' |
                paste -sd ' ' -). The training's own flags stand behind --"
        fi
        shift
    done
}

# plain NAME REGEX EXPECTED: where the flag is given it must be of that form.
plain() {
    [[ -z "${flag[$1]}" || "${flag[$1]}" =~ $2 ]] || fail "--$1: got '${flag[$1]}', expected $3"
}

# need NAME...: these flags must have been given.
need() {
    local key
    for key in "$@"; do
        [[ -n "${flag[$key]}" ]] || fail "--$key is missing"
    done
}

# number NAME LEAST: the flag must be a whole number of at least LEAST.
number() {
    local value="${flag[$1]}"
    if [[ ! "$value" =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2)); then
        fail "--$1: got '$value', expected a whole number of at least $2"
    fi
    flag[$1]="$((10#$value))"
}

# The training's flags must name a config; the work folder is the launcher's own flag, because it has to reach it too.
check_trainer() {
    local word config=
    for word in ${trainer[@]+"${trainer[@]}"}; do
        case "$word" in
            --workdir | --workdir=* | -workdir | -workdir=*) fail "--workdir stands before --, not behind it" ;;
            --distributed | --distributed=* | --nodistributed) fail "$word: the launcher decides that itself" ;;
            --config | --config=* | -config | -config=*) config=1 ;;
        esac
    done
    [[ -n "$config" ]] || fail "no --config behind --; expected as in: -- --config=configs/brpo.py:7b"
}
