//go:build !linux

package chain

func rename(from, to string) error { return linkOver(from, to) }
