// Package qcow2 is the driver for QEMU's copy-on-write image format, versions 2
// and 3 (docs/interop/qcow2.txt in QEMU's source). It reads and writes
// standard clusters, with subclusters or without, over a backing file or beside
// an external data file, encrypted or not, and compressed clusters; it takes,
// reverts to and deletes internal snapshots, with a VM's state; it keeps
// persistent dirty bitmaps; it checks, repairs, resizes and amends. Other files
// than the image itself are devices that the caller has opened: names in the
// image are only strings.
//
// # Order of writes
//
// A power cut may keep any subset of the 512-byte sectors that were written
// since the last Sync of the file. The driver's promise is that whatever is
// kept, the image is free of errors, its refcounts are at least the number of
// references (at worst there are leaks), what was synced is there, and each
// sector written since holds an old or a new content. The argument:
//
// Data that goes to a cluster which is allocated and not shared is written in
// place. No metadata changes, and Sync is one Sync of the file. If the cluster
// has subclusters, that goes for those which are stored.
//
// All other changes of the mapping happen in memory first: a new cluster gets
// its refcount in a cached refcount block, data and what is copied around it
// are written to the new cluster at once, and the L2 entry changes in the
// cached L2 table. The cluster that is replaced is put on a list of frees; its
// refcount doesn't change. A new L2 table is a new cluster as well. Sync, or a
// full cache, then does:
//
//	A  write refcount blocks and new L2 tables         Sync
//	B  write old L2 tables and the L1 table in place   Sync
//	C  apply the frees to the refcounts in memory
//
// A is left out where nothing needs it. Entries that were cleared, or got a zero
// flag, refer to nothing new. And refcounts are raised ahead, for up to 1 MiB
// of clusters at the end of the file that were never written; once these
// refcounts are durable, an entry for such a cluster, in the place of one that
// read as zeros, may be durable before the data: each sector reads as zeros
// then, as before, or as what was written (so not with encryption). So a commit that allocates takes one
// Sync, too, except for one in 1 MiB and where an L2 table is new. What is left
// of these clusters is given back by Close, and leaks in a crash (RepairLeaks).
//
// Nothing durable refers to what was written up to A, so any part of it may be
// missing after a crash in A: raised refcounts are leaks. After A, all that B
// refers to is durable. B's tables are written in place; an entry is 8 bytes
// within one sector, so each is old or new, and both kinds are valid: the
// clusters of the old ones aren't free before C, when nothing durable refers
// to them. A refcount lowered in C may be written at any later time, and a
// freed cluster may be reused at once: if its refcount is still 1 on disk, so
// much the better. A new L2 table counts as old from the moment that the L1 table
// is written, even if it is still empty. For the same reasons a refcount block may
// be evicted from
// the cache whenever room is needed. A dirty L2 table may not, so eviction
// does A to C.
//
// Compressed data is written to clusters that have it only, behind what is there,
// and raises the refcount of each. That is durable before an entry for it, in A.
// Nothing is written again in place.
//
// A request reads or writes data without a lock, so somebody may still be at a
// cluster when C is due for it. Its refcount is lowered when all requests are
// over that found it in the tables.
//
// Data in an external data file is at the disk's own offsets. It has no
// refcounts, and the data file is synced before A and B. What is discarded
// there is given back in C, unless it is mapped again by then.
//
// A new refcount block is durable before the refcount table's entry for it is
// written, in place. That entry is durable before it matters, as A comes after
// it.
//
// With lazy refcounts, A sets the header's dirty bit instead of writing
// refcount blocks, once, and Close writes these and clears it. An image that is
// dirty has its refcounts made anew when it is opened for writing.
//
// Everything else (snapshots, a longer L1 or refcount table) is a change of
// structure, for which the tables that change, refcount blocks included, are
// written to clusters that are free both before and after; then comes a Sync;
// then one write of the header's first sector switches to the new L1 table,
// refcount table, snapshot table and size; then comes a Sync. A crash leaves
// the old state or the new one, and no leaks. Reference counts and copied
// flags can't disagree this way, which in-place updates of both can't avoid.
//
// Of the header beyond its first 104 bytes, only extensions that this driver
// knows and the name of the backing file are ever changed, so unknown fields and
// extensions stay. Where extensions reach beyond the first sector, they are
// written where the header's cluster is unused, and header_length, which is in
// the first sector, goes there and back.
//
// Bitmaps that record writes are marked as in use, durably, before the first
// write. Close, and every change of a bitmap, writes those that changed to free
// clusters, with a new directory, as a change of structure. After a crash a
// bitmap is marked as in use, or true.
//
// After a failed write or Sync of the file nothing is written any more
// (image.ErrPoisoned).
//
// # Memory
//
// The L1 table (8 bytes for each 2^(2n-3) bytes of disk with clusters of 2^n:
// 512 MiB with 64 KiB clusters; 32 MiB at most) and the refcount table (8 MiB at
// most) are in memory, besides a cache of L2 tables and refcount blocks, and in an
// image that is open for writing 4 bytes for each of these.
package qcow2
