# The functions by which a script reports to the host.

# say KEY=VALUE: reports a fact.
say() {
    echo "@@ $*" >&3
}

# Reports the block layer's counters, as in the kernel's Documentation/block/stat.rst.
counters() {
    say "stat=$(tr -s ' ' </sys/block/vda/stat | sed 's/^ //')"
}

# checkpoint NAME: syncs the disk, reports, and waits until the host has measured.
checkpoint() {
    sync
    counters
    say "checkpoint=$1"
    read -r _ <&3
}

# Reports every file in a folder with its checksum, read from the disk and not from the page cache.
say_files() {
    echo 3 >/proc/sys/vm/drop_caches
    for path in "$1"/*; do
        [ -f "$path" ] || continue
        say "file=$(sha256sum <"$path" | cut -c1-64) ${path##*/}"
    done
}

# Reports one checksum of the disk's first $1 MiB, whatever is there.
say_disk_sum() {
    echo 3 >/proc/sys/vm/drop_caches
    say "disk.md5=$(dd if=/dev/vda bs=1M count="$1" 2>/dev/null | md5sum | cut -c1-32)"
}
