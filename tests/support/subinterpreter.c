/* Runs Python code in an interpreter of its own, and ends that, as mod_wsgi does. */
typedef struct _ts PyThreadState;
PyThreadState *PyThreadState_Get(void);
PyThreadState *PyThreadState_Swap(PyThreadState *state);
PyThreadState *Py_NewInterpreter(void);
void Py_EndInterpreter(PyThreadState *state);
int PyRun_SimpleStringFlags(const char *code, void *flags);

int run(const char *code) {
    PyThreadState *outer = PyThreadState_Get(), *inner = Py_NewInterpreter();
    int failed = PyRun_SimpleStringFlags(code, 0);
    Py_EndInterpreter(inner);
    PyThreadState_Swap(outer);
    return failed;
}
