# How a script talks to the host.

# say KEY=VALUE: a fact
say() {
    echo "@@ $*" >&3
}

# The counters of the block layer, as the kernel's Documentation/block/stat.rst lists them.
counters() {
    say "stat=$(tr -s ' ' </sys/block/vda/stat | sed 's/^ //')"
}

# checkpoint NAME: what was done is on the disk; waits until the host has looked
checkpoint() {
    sync
    counters
    say "checkpoint=$1"
    read -r _ <&3
}

# Every file in a folder, with what is in it: read back from the disk, not from memory.
say_files() {
    echo 3 >/proc/sys/vm/drop_caches
    for path in "$1"/*; do
        [ -f "$path" ] || continue
        say "file=$(sha256sum <"$path" | cut -c1-64) ${path##*/}"
    done
}

# The first $1 MiB of the disk in one sum, file system or not.
say_disk_sum() {
    echo 3 >/proc/sys/vm/drop_caches
    say "disk.md5=$(dd if=/dev/vda bs=1M count="$1" 2>/dev/null | md5sum | cut -c1-32)"
}
