package qmp

import (
	"errors"
	"fmt"
)

// Kinds of errors, for errors.Is.
var (
	// ErrProtocol: the peer doesn't speak QMP, or not by its rules.
	ErrProtocol = errors.New("qmp: not QEMU's machine protocol")
	// ErrTimeout: no answer in time. The command may be carried out all
	// the same.
	ErrTimeout = errors.New("qmp: no answer in time")
	// ErrBusy: the monitor takes one client at a time, and has one; or
	// too many commands wait for answers.
	ErrBusy = errors.New("qmp: the monitor is busy")
	// ErrRefused: QEMU refused a command, or a job failed: an *Error or a
	// *JobError.
	ErrRefused = errors.New("qmp: refused")
	// ErrDisconnected: the connection ended, as when QEMU ends.
	ErrDisconnected = errors.New("qmp: the connection ended")
)

// An Error is what QEMU answered to a command.
type Error struct {
	Command string
	Class   string // GenericError, CommandNotFound, DeviceNotFound, ...
	Desc    string
}

func (e *Error) Error() string { return fmt.Sprintf("QEMU: %s: %s", e.Command, e.Desc) }

// Is tells that an Error is ErrRefused.
func (e *Error) Is(target error) bool { return target == ErrRefused }

// A JobError is a job that QEMU began and that failed.
type JobError struct {
	Command string // what began it
	ID      string
	Desc    string
}

func (e *JobError) Error() string { return fmt.Sprintf("QEMU: %s: %s", e.Command, e.Desc) }

// Is tells that a JobError is ErrRefused.
func (e *JobError) Is(target error) bool { return target == ErrRefused }
