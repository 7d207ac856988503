//! The long part of `--help`: how to combine the pieces, by example.

/// After `strata --help`.
pub const PROGRAM: &str = "\
Examples:
  strata serve --blk-file vm.qcow2 --socket-path /run/vm.sock
  strata info vm.qcow2
  strata check vm.qcow2
  strata snapshot -c before-update vm.qcow2
  strata resize vm.qcow2 +10G
  strata ctl /run/vm.ctl stats

`strata serve --help` shows how to attach the disk to QEMU and to Cloud Hypervisor.

Exit codes:
  serve, info, snapshot, resize, ctl: 0 done; 1 failed, and the standard error says why; 2 wrong usage
  check, as qemu-img check: 0 clean; 1 could not be checked (wrong usage too); 2 corrupt; 3 leaks only; 63 the format has
  nothing that could be checked

With --json (or --output=json, as with qemu-img) a failure with exit code 1, 2 or 63 prints an object to the standard
output in place of the result, {\"error\": {\"kind\", \"message\", \"file\", \"structure\", \"offset\", \"hint\"}}; what is not
known is null. The text for people is on the standard error all the same. For check, 2 is a report and no failure.";

/// After `strata serve --help`.
pub const SERVE: &str = "\
Serve a qcow2 image, with its backing files (--blk-file may be left out: `strata serve vm.qcow2 ...`):
  strata serve --blk-file vm.qcow2 --socket-path /run/vm.sock

Attach it to QEMU; the guest's memory must be shared with the daemon (share=on), and may not be larger or smaller
than -m says:
  qemu-system-x86_64 -machine q35,accel=kvm,memory-backend=mem -cpu host -smp 4 -m 4G \\
    -object memory-backend-memfd,id=mem,size=4G,share=on \\
    -chardev socket,id=vm-disk,path=/run/vm.sock \\
    -device vhost-user-blk-pci,chardev=vm-disk,num-queues=4

Attach it to Cloud Hypervisor:
  cloud-hypervisor --kernel vmlinux --cmdline 'console=hvc0 root=/dev/vda1' --cpus boot=4 \\
    --memory size=4G,shared=on \\
    --disk vhost_user=true,socket=/run/vm.sock,num_queues=4,queue_size=256

More ways to serve:
  a raw image (a raw file that qcow2 is expected in is refused, and the other way round would destroy it):
    strata serve --blk-file disk.img --format raw --socket-path /run/disk.sock
  read-only, as often as you like at a time; QEMU needs nothing special for it:
    strata serve --blk-file base.qcow2 --read-only --socket-path /run/base.sock
  an overlay whose header does not say what its backing file is:
    strata serve --blk-file overlay.qcow2 --backing-format raw --socket-path /run/vm.sock
  an internal snapshot, read-only, as the disk was when it was taken:
    strata serve --blk-file vm.qcow2 --snapshot before-update --socket-path /run/old.sock
  an image whose data is in another file; never the one that its header names, unless you name it:
    strata serve --blk-file vm.qcow2 --data-file vm.data --socket-path /run/vm.sock
  to machines that run as another user of the group kvm:
    strata serve --blk-file vm.qcow2 --socket-path /run/vm.sock --socket-group kvm --socket-mode 0660

Backing files: an image names its backing file, and whoever can write to an image can have it name any file of this
host that the daemon may read, and so have a guest read it. --chain-root DIR takes the image and every file below it only
from DIR and what is below that. It is judged by where the file is, with symlinks followed, before it is opened: a symlink out of the
folder is refused, one into it is fine. A hard link in the folder is a part of it, and so is what is mounted there. Of
names in the form json:{...} those are taken that hold no more than a format (qcow2 or raw) and a file by its whole path.

Bitmaps: persistent dirty bitmaps that are enabled are marked in use (inconsistent) when an image is opened for writing,
as writes are not noted in them: QEMU then neither uses nor trusts them, and `qemu-img bitmap --remove` removes them.
Disabled ones stay as they are.

The page cache: --cache is for the image (and its data file), --backing-cache for the files below it. Those are only read,
and many disks may share one: through the page cache it is read once for all of them, and its memory is the host's to take
back. Where the page cache is not wanted at all, or hosts share files that change, --backing-cache direct bypasses it.

Queues: a queue is a thread. One for each of the guest's processors is right (QEMU's default); the guest gets as many
as its machine's num-queues says, and --num-queues is only the most that may be.

No space on the host: with --on-enospc report (the default) a request that needs space fails, and the guest sees an I/O
error. With --on-enospc wait it is held and tried again, at least once a second, until there is space; reads and writes
that need none go on. To the guest the disk is just slow: mind its timeouts. A flush that finds no space for metadata
waits likewise. The log says when requests begin to wait and when none does any more. What stops the disk's queues fails those
that wait, and the guest sees an I/O error: a machine that is paused, reset or migrated, or that leaves, and a daemon
that is stopped. So leave the machine running, and make space.

Zeros and discards: what the guest discards goes back to the host, unless --discard ignore says that it stays; the guest
may discard in either case. With --discard-no-unref only the space goes back: the cluster keeps its place in the image and
is written there again, so that an image that is trimmed often stays in order and its file does not outgrow the disk.
--detect-zeroes looks at what the guest writes, cluster by cluster: zeros take no space where there is none yet, and with
unmap they give back what there is. It costs a look at the first bytes of each cluster, and at all of those that are zero.

io_uring: where the host refuses it (an old kernel, sysctl kernel.io_uring_disabled, a container's seccomp filter), threads
do the I/O, up to 64 of them, and the log says so. --aio io_uring refuses to serve like that.

Control socket: with --control-socket PATH, `strata ctl PATH ...` shows the disk, its chain, its counters and events, and
flushes it or ends the daemon. It is HTTP with JSON: `curl --unix-socket PATH http://strata/v1/stats`. The file is for this
user alone (0600), or with --control-group for a group, too (0660). Whoever may use it can end the daemon.

Stopping: SIGTERM or SIGINT finishes the requests in hand, brings everything to disk, closes the image cleanly and
exits 0. A machine may leave and another attach at any time; the daemon stays.

Replacing: with --replace a new daemon, perhaps of a new version, takes the socket and the image over from the one that
serves. The machine sees a short pause and no error if it connects again (QEMU: reconnect-ms). If the new one cannot
serve, the old one goes on.

Durability: a guest's flush (fsync) returns when the data is on the host's disk, with --cache=direct and
--cache=writeback alike.";

/// After `strata info --help`.
pub const INFO: &str = "\
Examples:
  strata info vm.qcow2
  strata info --backing-chain vm.qcow2
  strata info --json vm.qcow2 | jq '.\"virtual-size\"'

Files are opened read-only, and nothing is changed; backing files only with --backing-chain. An image is described also
if it has what cannot be served; `not served` says what. With --json an object is printed, or with --backing-chain an array of them, the image
first. An image that is open for writing elsewhere is refused, as
what it says of itself may change at any moment; -U (--force-share) reads it all the same.";

/// After `strata check --help`.
pub const CHECK: &str = "\
Examples:
  strata check vm.qcow2
  strata check -r leaks vm.qcow2
  strata check --json vm.qcow2 | jq .corruptions

Exit codes, as of qemu-img check: 0 clean, 1 could not be checked (wrong usage too), 2 corrupt, 3 leaks only, 63 the
format has nothing that could be checked (raw, or a file that is known to be in another format). After a repair they tell
what is left. A note changes none of them. The names in JSON are those of `qemu-img check --output=json`.

Without -r nothing is changed, and others may read the image at the same time; -r needs it alone. Every refcount is
computed anew from the tables of the active disk, of all snapshots and of persistent bitmaps. -r leaks lowers refcounts
that are too high. -r all makes all refcounts and flags right, and clears the marks \"dirty\" and \"corrupt\"; it refuses
if tables that lead to data are damaged, as refcounts made from them would give away clusters that are in use. A repair
that is cut off can be run again. It never moves or changes data.

With -U an image in use is looked at: what is found may be what a program was just changing. Nothing is repaired then.";

/// After `strata snapshot --help`.
pub const SNAPSHOT: &str = "\
Examples:
  strata snapshot -l vm.qcow2
  strata snapshot -c before-update vm.qcow2
  strata snapshot -a before-update vm.qcow2
  strata snapshot -d before-update vm.qcow2

No machine may be using the image. A snapshot is called by its ID or by its name; where one's ID is another's name, the
ID counts, and -d refuses. (`qemu-img snapshot -d` goes by the name alone.) The names of new snapshots are unique.

-l lists an image in use only with -U, as its table may just have been changing.

A crash or a kill at any instant leaves the disk as it was or as it was to become, and every other snapshot as it is.

Each cluster counts by how many it is shared; an image made with refcount_bits=1 can have no snapshot of any data, and
with the usual 16 bits no cluster can be in more than 65,534 of them. What would pass that is refused.";

/// After `strata resize --help`.
pub const RESIZE: &str = "\
Examples:
  strata resize vm.qcow2 40G
  strata resize vm.qcow2 +10G
  strata resize --shrink vm.qcow2 -10G
  strata resize --format raw disk.img 40G

An image that strata serves is resized by strata serve itself: see --size-file there.

No machine may be using the image. A size is a multiple of 512 bytes. The new part of a disk reads as zero, also where a
backing file is longer. The data past the new end of a disk is lost: make its partitions and file
systems smaller first, in the guest.

Snapshots keep their size (in version 2 they cannot, so there an image with snapshots is refused). Persistent bitmaps fit
one size only, so an image with bitmaps is refused.

A crash or a kill at any instant leaves the disk with its old size or with its new one.";

/// After `strata ctl --help`.
pub const CTL: &str = "\
Examples, for a daemon that was started with --control-socket /run/vm.ctl:
  strata ctl /run/vm.ctl disk
  strata ctl /run/vm.ctl stats --json | jq .total.wr_bytes
  strata ctl /run/vm.ctl log-level warn,vhost_blk=debug
  strata ctl /run/vm.ctl events

The socket speaks HTTP/1.1 with JSON, so any client will do:
  curl --unix-socket /run/vm.ctl http://strata/v1/metrics
  curl --unix-socket /run/vm.ctl -X PUT -d '{\"level\": \"debug\"}' http://strata/v1/disk/log-level
`strata ctl /run/vm.ctl api` prints its description (OpenAPI 3.1).

Exit codes: 0 done; 1 failed or refused, and the standard error says why; 2 wrong usage.";
