package live

import "errors"

// Kinds of errors, for errors.Is; package image's too: ErrNotFound and ErrExist
// for snapshots, ErrUnsupported for disks that have none, ErrLocked for ErrInUse.
// What QEMU refuses has QEMU's own words.
var (
	// ErrNode: QEMU has no such block node: the machine wasn't started as
	// package machine's Layout.Nodes says.
	ErrNode = errors.New("QEMU has no such block node")
	// ErrInUse: another service is attached to the store.
	ErrInUse = errors.New("another service is attached")
	// ErrServer: QEMU's NBD server, of which there is one, is in use.
	ErrServer = errors.New("QEMU's NBD server is used by somebody else")
	// ErrWriters: writers didn't come to rest in time.
	ErrWriters = errors.New("writers of the store don't come to rest")
	// ErrStopped: loading a snapshot failed half-way, and the machine stands
	// still, with its disk as it was at the snapshot, or not.
	ErrStopped = errors.New("the machine stands still")
	// ErrDevice: the machine has a device that keeps its own copy of what a
	// snapshot would revert. The remedy is to revert it while it is off.
	ErrDevice = errors.New("a device doesn't follow a snapshot that is loaded live")
	// ErrOther: QEMU has another image open than the one that was named.
	ErrOther = errors.New("QEMU has another image open")
)
