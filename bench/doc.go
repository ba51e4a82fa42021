// Package bench compares the store with what else one would use to make bytes
// durable: "make bench" prints the tables. It is all tests. No time is ever
// asserted, but the counts that a commit promises are.
//
// How it measures: all subjects of a table keep their files in one directory,
// which must be on a real disk ($NVSTORE_BENCH_DIR, or tmp at the top of the
// tree). They take turns, a few operations each and in another random order
// each time, so that whatever else the machine does hits all alike. A row has
// the median and the 90th percentile of the wall time of single operations,
// the median as a ratio to the first subject's, and the mean CPU time of an
// operation, that of a server process included.
//
// The tables:
//
//   - Durable puts. Every operation overwrites one of eight values that are
//     there already, in blocks that are allocated already, with bytes that are
//     all different, and returns when they are durable. A goal is printed as
//     what was measured divided by what is allowed.
//   - What a commit writes: bytes, writes and Syncs as the file sees them,
//     after random puts and deletions, by the number of blobs.
//   - Opening, with the page cache warm, until the first read is possible.
//     A crash is a store whose file is closed underneath it after a commit.
//     SQLite attaches the file in a process that runs already.
//   - Sealing against AES-256-GCM with a key that is set up already.
//   - LUKS: AES-XTS by sector size, conversion beside qemu-img, and unlocking
//     beside cryptsetup.
//   - Images: nvtool img beside qemu-img, each in a process of its own, on
//     $NVSTORE_BENCH_MIB (1024) of the machine's own files, the best of several
//     runs; opening a qcow2 of 1 TiB; random requests on a qcow2, through
//     qemu-nbd with fio as its client and on the Device.
//   - TPMs: nvtpm beside swtpm, the same commands through a unix socket; what a
//     command writes, counted by strace; start and memory. swtpm never syncs
//     its folder: "fsync" is a client that does it after each command.
//   - The most memory that a process ever had in RAM (VmHWM), for one kind of
//     work each in a process of its own.
//
// Keys are raw ones throughout: deriving a key from a passphrase takes as long
// as it was made to take.
package bench
