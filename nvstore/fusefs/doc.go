// Package fusefs shows a store's blobs as files in a folder, by FUSE, so that
// any program works on them: an editor, swtpm with dir://, tools for firmware
// variables.
//
// # What is what
//
// A blob a/b/c is the file c in the folder a/b. A folder is there while there
// are blobs below it, and one that is empty for as long as the mount lasts. A
// name that the store refuses is EINVAL. There are no links, devices or
// extended attributes; owner, mode and times can be set and last as long as the
// mount, except that a file's time of change is the blob's.
//
// # Durability
//
// Creating, removing and renaming are commits, durable when the call returns.
// Content is kept in memory until fsync, msync, or close, which commit it, or
// until five seconds have passed. A rename commits first what was written to
// the file, so that writing a file and renaming it over another replaces the
// other whole or not at all. fsyncs of several files that come together share a
// commit. Unmounting commits everything.
//
// A file that is removed while it is open stays, under a name below
// ".nvtool-unlinked" that the mount doesn't show, until it is closed; what a
// crash leaves there is removed by the next mount.
//
// # Reverts
//
// If the store is reverted underneath, open files follow; what was written and
// not committed is lost, which the next call says with EIO.
package fusefs
