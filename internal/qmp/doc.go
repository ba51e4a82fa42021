// Package qmp is a client of QEMU's machine protocol, as docs/interop/qmp-spec.rst
// of QEMU has it: greeting, capabilities, commands, events, and the jobs that
// save and load snapshots.
//
// It is written here because what there is elsewhere waits without a bound for
// a QEMU that is busy, reads lines of any length or of 64 KiB at the most, and
// knows no jobs. QEMU answers nobody while it saves or loads a snapshot, so a
// command has a timeout, a job none but its context's.
//
// The peer is taken for an enemy: messages are bounded, replies must be to
// commands that were sent, and everything that waits has an end.
package qmp
