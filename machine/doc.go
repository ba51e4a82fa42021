// Package machine is the layout of a virtual machine's disk that has the
// machine's state in its tail.
//
// One image, whose virtual size is far larger than the disk that the guest
// sees, holds three things:
//
//	[0, DiskSize)                        the guest's disk
//	[StateOffset, StateOffset+StateSize) the state window: a store (package nvstore)
//	the last 128 KiB                     the layout record, in two copies
//
// QEMU opens the image once, and windows of it as nodes of their own (see
// Layout.Nodes). The guest sees the first alone. The disk grows below the
// window without a change of the image's size, and a snapshot of the image is
// one of disk and state at the same instant.
//
// The record is part of the virtual disk, so it is there in every copy of it,
// in whatever format, and is reverted with it. It is defined in FORMAT.md,
// section 18. Whoever can write the whole image can forge it; a guest can't, as
// long as it is given its window and nothing else.
package machine
