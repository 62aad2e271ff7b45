/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * module.c: pysplice._cext, where Python meets C.  C moves bytes, Python
 * decides; the whole boundary is in pysplice/_cext.pyi.
 */
#include "tap.h"

#include <errno.h>

#include "busy_poll.h"
#include "datagram.h"
#include "message.h"
#include "sockio.h"
#include "stream.h"

static PyStructSequence_Field run_fields[] = {
	{"key", "addresses and ports as on the wire, source first"},
	{"seq", "sequence number of the first byte"},
	{"ack", "latest acknowledgement"},
	{"window", "latest window, as on the wire"},
	{"flags", "all flags seen"},
	{"length", "bytes of payload"},
	{"frames", "segments; for bare ACKs the repetitions of the last"},
	{"handle", "names the payload until the next drain()"},
	{"mss", "option of a SYN, 0: none"},
	{"wscale", "option of a SYN, -1: none"},
	{"last_seq", "sequence number of the last segment"},
	{NULL, NULL},
};

static PyStructSequence_Desc run_desc = {
	.name = "pysplice._cext.Run",
	.doc = "Segments of one flow that follow each other.",
	.fields = run_fields,
	.n_in_sequence = 11,
};

static PyStructSequence_Field datagrams_fields[] = {
	{"key", "addresses and ports as on the wire, source first"},
	{"frames", "how many"},
	{"length", "bytes of payload in all"},
	{"ttl", "or hop limit"},
	{"handle", "names the payload until the next drain()"},
	{"mac", "MAC address that the first came from"},
	{"df", "1: not to be fragmented (DF, or IPv6)"},
	{"group", "1: sent to a multicast or broadcast MAC"},
	{NULL, NULL},
};

static PyStructSequence_Desc datagrams_desc = {
	.name = "pysplice._cext.Datagrams",
	.doc = "Datagrams of one flow that follow each other.",
	.fields = datagrams_fields,
	.n_in_sequence = 8,
};

static PyStructSequence_Field facts_fields[] = {
	{"sndbuf", "SK_MEMINFO_SNDBUF, bytes of truesize"},
	{"wmem_queued", "SK_MEMINFO_WMEM_QUEUED, bytes of truesize; -1: unknown"},
	{"outq", "SIOCOUTQ, bytes unsent and unacknowledged"},
	{"snd_mss", "tcpi_snd_mss, bytes"},
	{"snd_wnd", "tcpi_snd_wnd, bytes; -1: unknown"},
	{"rtt", "tcpi_rtt, microseconds"},
	{"last_data_sent", "tcpi_last_data_sent, milliseconds ago"},
	{"wmem_max", "tcp_wmem[2] as passed in, bytes"},
	{NULL, NULL},
};

static PyStructSequence_Desc facts_desc = {
	.name = "pysplice._cext.SocketFacts",
	.doc = "What a host TCP socket says about itself.",
	.fields = facts_fields,
	.n_in_sequence = SOCK_FACTS_COUNT + 1,
};

static PyObject *socket_facts(PyObject *module, PyObject *args)
{
	struct module_state *state = PyModule_GetState(module);
	struct sock_facts facts;
	long long wmem_max, snd_mss;
	PyObject *result;
	int fd, rc;

	if (!PyArg_ParseTuple(args, "iLL:socket_facts", &fd, &wmem_max,
			      &snd_mss))
		return NULL;
	rc = sock_facts_read(fd, snd_mss, &facts);
	if (rc) {
		errno = -rc;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	const int64_t values[SOCK_FACTS_COUNT + 1] = {
		facts.sndbuf,  facts.wmem_queued, facts.outq,
		facts.snd_mss, facts.snd_wnd,     facts.rtt,
		facts.last_data_sent, wmem_max,
	};
	result = PyStructSequence_New(state->facts_type);
	if (!result)
		return NULL;
	for (int i = 0; i <= SOCK_FACTS_COUNT; i++)
		PyStructSequence_SetItem(result, i,
					 PyLong_FromLongLong(values[i]));
	if (PyErr_Occurred())
		Py_CLEAR(result);
	return result;
}

static PyObject *bound_ports(PyObject *module, PyObject *args)
{
	uint8_t ports[PORTS_BYTES] = {0};
	int fd, family, protocol, rc;
	unsigned without;

	(void)module;
	if (!PyArg_ParseTuple(args, "iiiI:bound_ports", &fd, &family, &protocol,
			      &without))
		return NULL;
	rc = sock_ports_read(fd, family, protocol, without, ports);
	if (rc) {
		errno = -rc;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyBytes_FromStringAndSize((char *)ports, sizeof(ports));
}

static int module_exec(PyObject *module)
{
	struct module_state *state = PyModule_GetState(module);

	state->stream_type = (PyTypeObject *)PyType_FromModuleAndSpec(
		module, &stream_spec, NULL);
	state->tap_type = (PyTypeObject *)PyType_FromModuleAndSpec(
		module, &tap_spec, NULL);
	state->packets_type = (PyTypeObject *)PyType_FromModuleAndSpec(
		module, &packets_spec, NULL);
	state->datagrams_type = PyStructSequence_NewType(&datagrams_desc);
	state->run_type = PyStructSequence_NewType(&run_desc);
	state->facts_type = PyStructSequence_NewType(&facts_desc);
	if (!state->stream_type || !state->tap_type || !state->run_type ||
	    !state->facts_type || !state->packets_type ||
	    !state->datagrams_type)
		return -1;
	if (PyModule_AddType(module, state->stream_type) ||
	    PyModule_AddType(module, state->tap_type) ||
	    PyModule_AddType(module, state->packets_type) ||
	    PyModule_AddObjectRef(module, "Datagrams",
				  (PyObject *)state->datagrams_type) ||
	    PyModule_AddObjectRef(module, "Run",
				  (PyObject *)state->run_type) ||
	    PyModule_AddObjectRef(module, "SocketFacts",
				  (PyObject *)state->facts_type))
		return -1;
	return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
	struct module_state *state = PyModule_GetState(module);

	Py_VISIT(state->stream_type);
	Py_VISIT(state->tap_type);
	Py_VISIT(state->packets_type);
	Py_VISIT(state->datagrams_type);
	Py_VISIT(state->run_type);
	Py_VISIT(state->facts_type);
	return 0;
}

static int module_clear(PyObject *module)
{
	struct module_state *state = PyModule_GetState(module);

	Py_CLEAR(state->stream_type);
	Py_CLEAR(state->tap_type);
	Py_CLEAR(state->packets_type);
	Py_CLEAR(state->datagrams_type);
	Py_CLEAR(state->run_type);
	Py_CLEAR(state->facts_type);
	return 0;
}

static PyMethodDef module_methods[] = {
	{"socket_facts", socket_facts, METH_VARARGS, NULL},
	{"bound_ports", bound_ports, METH_VARARGS, NULL},
	{"busy_poll", busy_poll, METH_VARARGS, NULL},
	{"ancillary", message_ancillary, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
	{Py_mod_exec, module_exec},
	{0, NULL},
};

static struct PyModuleDef module_def = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "pysplice._cext",
	.m_doc = "The part of pysplice that moves bytes.",
	.m_size = sizeof(struct module_state),
	.m_methods = module_methods,
	.m_slots = module_slots,
	.m_traverse = module_traverse,
	.m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__cext(void);

PyMODINIT_FUNC PyInit__cext(void)
{
	return PyModuleDef_Init(&module_def);
}
