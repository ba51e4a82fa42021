// Package raw is the driver for images without a format: a regular file, or a
// block device, whose bytes are the Device's.
//
// # Locks
//
// An open image carries the byte-range locks that QEMU puts on its own (block/
// file-posix.c, raw_check_lock_bytes), so that a running QEMU, qemu-img,
// qemu-nbd and other users of this package refuse what is in use, and are
// refused. A reader shares with readers; a writer shares with nobody, except
// that QEMU's tools let a read-only `-f raw` opener in, and one with -U.
// The locks are advisory: dd and cp don't ask. On a network file system they
// hold only if that forwards them. Off Linux there are no locks, so NoLock has
// to be asked for.
//
// # Durability
//
// Sync is fdatasync, which on Linux covers the size of a file that grew, and
// fsync after a Resize. After a write, Sync, discard or zeroing failed, all
// later ones fail with image.ErrPoisoned: the kernel may have marked pages
// clean that it never wrote, and a second fdatasync would report success. Reads
// go on working; after DropCache they show what the medium has.
package raw
