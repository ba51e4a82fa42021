// Package bench compares the store with what else one would use to make bytes
// durable: "make bench" prints the tables. It is all tests, and nothing in it
// asserts a time.
//
// How it measures: all subjects of a table keep their files in one directory,
// which must be on a real disk ($NVSTORE_BENCH_DIR, or tmp at the top of the
// tree). They take turns, a few operations each, so that whatever else the
// machine does hits all alike. A row has the median and the 90th percentile of
// the wall time of single operations, the median as a ratio to the first
// subject's, and the mean CPU time of an operation, that of a server process
// included.
//
// Every operation overwrites one of eight values that are there already, with
// other bytes, and returns when they are durable.
package bench
