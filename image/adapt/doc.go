// Package adapt shows a Device as what other libraries read: as an image of
// lima's go-qcow2reader, and as a file of io/fs.
package adapt
